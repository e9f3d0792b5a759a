//! The command line, as a person uses it on a node, or on a machine that is none.

use std::ffi::OsString;
use std::process::{Command, Output, Stdio};

use holdfast_lab::cluster::Cluster;
use serde::de::DeserializeOwned;

/// Where somebody types, and which agent is asked.
pub struct Shell<'a> {
    cluster: &'a Cluster,
    connection: Vec<OsString>,
}

impl<'a> Shell<'a> {
    /// On a node: its own agent is asked.
    pub fn on(cluster: &'a Cluster, host: &str) -> Self {
        Self { cluster, connection: vec!["--socket".into(), cluster.socket(host).into()] }
    }

    /// On the machine outside the cluster, which has no agent.
    pub fn afar(cluster: &'a Cluster, connection: &[&str]) -> Self {
        Self { cluster, connection: connection.iter().map(OsString::from).collect() }
    }

    pub fn run(&self, words: &[&str]) -> Output {
        let outside = self.cluster.lab().fabric().client();
        let mut command = Command::new(&self.cluster.spec().binary);
        command.args(&self.connection).args(words).stdin(Stdio::null());
        outside.run(|| command.output().unwrap()).unwrap()
    }

    pub fn ok(&self, words: &[&str]) -> String {
        let output = self.run(words);
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "holdfast {words:?}: {:?}\n{out}\n{err}", output.status);
        out.into_owned()
    }

    pub fn json<T: DeserializeOwned>(&self, words: &[&str]) -> T {
        let text = self.ok(words);
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("holdfast {words:?}: {error}: {text}"))
    }

    /// The sentence with which a command fails.
    pub fn fails(&self, words: &[&str], code: i32) -> String {
        let output = self.run(words);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "holdfast {words:?}: {error}");
        assert!(error.trim().len() > 10 && !error.contains("panicked"), "holdfast {words:?}: {error:?}");
        error
    }
}
