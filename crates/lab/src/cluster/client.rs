//! A client of one node's API, over the agent's unix socket.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use holdfast_api as api;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::http::{self, Console};
use super::stream::{ChangeStream, EventStream};

/// How long one request may take, unless another deadline is set.
const DEADLINE: Duration = Duration::from_secs(20);
/// How long one request may wait for a job: the API's own limit.
const JOB_WAIT: Duration = Duration::from_secs(60);

/// Why a request had no success.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// The node understood it and said no.
    #[error("{status} {code}: {message}")]
    Refused {
        /// The HTTP status, from 400 on.
        status: u16,
        /// The word for programs, such as `not_found`.
        code: String,
        /// The sentence for people.
        message: String,
    },
    /// There was no whole answer: what was asked may have been done or not.
    #[error("no answer from {} to {request}: {source}", socket.display())]
    NoAnswer {
        /// The node's socket.
        socket: PathBuf,
        /// Method and path.
        request: String,
        /// What stopped it.
        source: io::Error,
    },
}

impl ApiError {
    /// The word for programs; `no_answer` when none arrived.
    pub fn code(&self) -> &str {
        match self {
            Self::Refused { code, .. } => code,
            Self::NoAnswer { .. } => "no_answer",
        }
    }

    /// The HTTP status; none when no answer arrived.
    pub fn status(&self) -> Option<u16> {
        match self {
            Self::Refused { status, .. } => Some(*status),
            Self::NoAnswer { .. } => None,
        }
    }
}

/// A client of one node's API. Each request has a connection of its own.
#[derive(Debug, Clone)]
pub struct ApiClient {
    socket: PathBuf,
    deadline: Duration,
}

type Answer<T> = Result<T, ApiError>;

impl ApiClient {
    /// A client of the agent that listens on `socket`.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into(), deadline: DEADLINE }
    }

    /// The same with another deadline for each request.
    pub fn within(&self, deadline: Duration) -> Self {
        Self { deadline, ..self.clone() }
    }

    /// The socket on which the agent listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    fn no_answer(&self, method: &str, path: &str, source: io::Error) -> ApiError {
        ApiError::NoAnswer { socket: self.socket.clone(), request: format!("{method} {path}"), source }
    }

    fn open(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer<http::Answer> {
        let failed = |source| self.no_answer(method, path, source);
        let answer = http::send(&self.socket, method, path, headers, body, self.deadline).map_err(failed)?;
        if answer.status < 400 {
            return Ok(answer);
        }
        let status = answer.status;
        let bytes = answer.body.whole(self.deadline).map_err(failed)?;
        Err(match serde_json::from_slice::<api::ErrorBody>(&bytes) {
            Ok(body) => ApiError::Refused { status, code: body.error.code, message: body.error.message },
            Err(_) => {
                let message = String::from_utf8_lossy(&bytes).into_owned();
                ApiError::Refused { status, code: "unreadable".into(), message }
            }
        })
    }

    /// Sends bytes as they are and returns the answer's body.
    ///
    /// # Errors
    /// See [`ApiError`].
    pub fn raw(&self, method: &str, path: &str, body: &[u8]) -> Answer<Vec<u8>> {
        let answer = self.open(method, path, &[("Content-Type", "application/json")], body)?;
        answer.body.whole(self.deadline).map_err(|source| self.no_answer(method, path, source))
    }

    fn read<T: DeserializeOwned>(&self, method: &str, path: &str, body: &[u8]) -> Answer<T> {
        let bytes = self.raw(method, path, body)?;
        serde_json::from_slice(&bytes).map_err(|error| self.no_answer(method, path, error.into()))
    }

    /// Asks for `path`, such as `/api/v1/nodes`.
    ///
    /// # Errors
    /// See [`ApiError`].
    pub fn get<T: DeserializeOwned>(&self, path: &str) -> Answer<T> {
        self.read("GET", path, &[])
    }

    /// Sends a request with a body; `()` for none.
    ///
    /// # Errors
    /// See [`ApiError`].
    pub fn call<T: DeserializeOwned>(&self, method: &str, path: &str, body: &impl Serialize) -> Answer<T> {
        let body = serde_json::to_vec(body).map_err(|error| self.no_answer(method, path, error.into()))?;
        self.read(method, path, if body == b"null" { b"" } else { &body })
    }

    /// Posts a body.
    ///
    /// # Errors
    /// See [`ApiError`].
    pub fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Answer<T> {
        self.call("POST", path, body)
    }

    /// Deletes something that is gone when the answer comes.
    ///
    /// # Errors
    /// See [`ApiError`].
    pub fn delete(&self, path: &str) -> Answer<()> {
        self.raw("DELETE", path, &[]).map(drop)
    }

    /// What changes from now on.
    ///
    /// # Errors
    /// See [`ApiError`].
    pub fn changes(&self) -> Answer<ChangeStream> {
        let answer = self.open("GET", "/api/v1/stream", &[], &[])?;
        Ok(ChangeStream::new(answer.body))
    }

    /// Events with an index above `since`, those that were and those to come.
    ///
    /// # Errors
    /// See [`ApiError`].
    pub fn follow_events(&self, since: u64) -> Answer<EventStream> {
        let answer = self.open("GET", &format!("/api/v1/events/stream?since={since}"), &[], &[])?;
        Ok(EventStream::new(answer.body))
    }

    /// Events after the one with index `last`, as a browser resumes a stream that broke.
    ///
    /// # Errors
    /// See [`ApiError`].
    pub fn resume_events(&self, last: u64) -> Answer<EventStream> {
        let header = last.to_string();
        let answer = self.open("GET", "/api/v1/events/stream", &[("Last-Event-ID", &header)], &[])?;
        Ok(EventStream::new(answer.body))
    }

    /// The serial console of a VM.
    ///
    /// # Errors
    /// See [`ApiError`].
    pub fn console(&self, vm: &str) -> Answer<Console> {
        let headers = [("Connection", "upgrade"), ("Upgrade", "holdfast-console")];
        let answer = self.open("GET", &format!("/api/v1/vms/{vm}/console"), &headers, &[])?;
        Ok(answer.body.upgraded())
    }

    /// A job as it is when it ends, or when `deadline` is over.
    ///
    /// # Errors
    /// See [`ApiError`].
    pub fn job_ended(&self, id: u64, deadline: Duration) -> Answer<api::JobView> {
        let wait = deadline.min(JOB_WAIT).as_secs();
        self.within(Duration::from_secs(wait) + DEADLINE).get(&format!("/api/v1/jobs/{id}?wait={wait}"))
    }
}

macro_rules! requests {
    ($($(#[doc = $doc:literal])+ $name:ident($($arg:ident: $kind:ty),*) -> $answer:ty = $method:literal $path:literal, $body:expr;)*) => {
        impl ApiClient {
            $(
                $(#[doc = $doc])+
                ///
                /// # Errors
                /// See [`ApiError`].
                pub fn $name(&self, $($arg: $kind),*) -> Answer<$answer> {
                    self.call($method, &format!($path), $body)
                }
            )*
        }
    };
}

requests! {
    /// How the cluster stands.
    cluster() -> api::ClusterView = "GET" "/api/v1/cluster", &();
    /// Hands the coordination to a node, or to any that can.
    hand_over(to: Option<&str>) -> api::HandedOver = "POST" "/api/v1/cluster/hand-over", &api::HandOver { to: to.map(str::to_owned) };
    /// The nodes.
    nodes() -> Vec<api::NodeView> = "GET" "/api/v1/nodes", &();
    /// Says how a node's host can be switched off.
    set_fencing(node: &str, request: &api::SetFencing) -> api::FencingView =
        "PUT" "/api/v1/nodes/{node}/fencing", request;
    /// Tries out a node's power fencing.
    test_fencing(node: &str) -> api::FenceTestView = "POST" "/api/v1/nodes/{node}/fence-test", &();
    /// Has a node's host switched off.
    fence(node: &str) -> api::FencingView = "POST" "/api/v1/nodes/{node}/fence", &();
    /// Who votes and why.
    quorum() -> api::QuorumView = "GET" "/api/v1/quorum", &();
    /// How the witness stands.
    witness() -> api::WitnessView = "GET" "/api/v1/quorum/witness", &();
    /// Makes a disk the witness.
    set_witness(disk: &str) -> api::WitnessView =
        "PUT" "/api/v1/quorum/witness", &api::SetWitness { disk: disk.into() };
    /// Says at which site a node stands.
    set_site(name: &str, site: &str) -> api::NodeView =
        "PATCH" "/api/v1/nodes/{name}", &api::SetNode { site: site.into() };
    /// The networks.
    networks() -> Vec<api::NetworkView> = "GET" "/api/v1/networks", &();
    /// The volumes.
    volumes() -> Vec<api::VolumeView> = "GET" "/api/v1/volumes", &();
    /// One volume.
    volume(name: &str) -> api::VolumeView = "GET" "/api/v1/volumes/{name}", &();
    /// The VMs.
    vms() -> Vec<api::VmView> = "GET" "/api/v1/vms", &();
    /// One VM.
    vm(name: &str) -> api::VmView = "GET" "/api/v1/vms/{name}", &();
    /// Why a VM is where it is.
    explain(name: &str) -> api::Explanation = "GET" "/api/v1/vms/{name}/explain", &();
    /// The jobs.
    jobs() -> Vec<api::JobView> = "GET" "/api/v1/jobs", &();
    /// One job.
    job(id: u64) -> api::JobView = "GET" "/api/v1/jobs/{id}", &();
    /// The events with an index above `since`.
    events(since: u64) -> Vec<api::Event> = "GET" "/api/v1/events?since={since}", &();
    /// Founds a cluster.
    found(name: &str) -> api::Founded = "POST" "/api/v1/cluster", &api::FoundCluster { name: name.into(), site: None };
    /// Makes the asked host join.
    join(request: &api::JoinCluster) -> api::NodeView = "POST" "/api/v1/join-cluster", request;
    /// Makes a join token.
    make_join_token(request: &api::MakeJoinToken) -> api::JoinLine = "POST" "/api/v1/join-tokens", request;
    /// Chooses the failover profile.
    set_profile(profile: api::ProfileName) -> api::ClusterView =
        "PUT" "/api/v1/cluster/profile", &api::SetProfile { profile };
    /// Changes a network, named by its name or by its subnet with `-` for `/`.
    set_network(name: &str, request: &api::SetNetwork) -> api::NetworkView =
        "PATCH" "/api/v1/networks/{name}", request;
    /// Adds a volume.
    add_volume(request: &api::AddVolume) -> api::VolumeView = "POST" "/api/v1/volumes", request;
    /// Renames a volume.
    rename_volume(name: &str, new: &str) -> api::VolumeView =
        "PATCH" "/api/v1/volumes/{name}", &api::RenameVolume { name: new.into() };
    /// Chooses who owns a volume.
    set_owner(name: &str, node: &str) -> api::VolumeView =
        "PUT" "/api/v1/volumes/{name}/owner", &api::SetOwner { node: node.into() };
    /// Sends a node's I/O through a volume's owner, or takes that back.
    set_redirect(name: &str, node: &str, redirect: bool) -> api::VolumeView =
        "PUT" "/api/v1/volumes/{name}/redirect", &api::SetRedirect { node: node.into(), redirect };
    /// Chooses how long VMs stay on a node whose I/O is redirected.
    set_redirect_patience(seconds: u64) -> api::ClusterView =
        "PUT" "/api/v1/cluster/redirect-patience", &api::SetRedirectPatience { seconds };
    /// Takes over a LUN that is a volume already.
    import_volume(request: &api::ImportVolume) -> api::VolumeView = "POST" "/api/v1/volume-imports", request;
    /// The files of a volume on a LUN.
    volume_files(name: &str) -> Vec<api::FileView> = "GET" "/api/v1/volumes/{name}/files", &();
    /// What a look at a LUN finds.
    check_volume(name: &str) -> api::VolumeCheck = "GET" "/api/v1/volumes/{name}/check", &();
    /// Writes a LUN's description anew.
    repair_volume(name: &str) -> api::VolumeCheck = "POST" "/api/v1/volumes/{name}/repair", &();
    /// Adds a switch.
    add_switch(request: &api::AddSwitch) -> api::SwitchView = "POST" "/api/v1/switches", request;
    /// Creates a VM.
    create_vm(request: &api::CreateVm) -> api::JobView = "POST" "/api/v1/vms", request;
    /// Deletes a VM that is off.
    delete_vm(name: &str) -> api::JobView = "DELETE" "/api/v1/vms/{name}", &();
    /// Starts a VM.
    start_vm(name: &str) -> api::JobView = "POST" "/api/v1/vms/{name}/start", &();
    /// Shuts a VM down, or switches it off.
    stop_vm(name: &str, force: bool) -> api::JobView = "POST" "/api/v1/vms/{name}/stop", &api::StopVm { force };
    /// Shuts a VM down and starts it again.
    restart_vm(name: &str) -> api::JobView = "POST" "/api/v1/vms/{name}/restart", &();
    /// Lets a VM stand still.
    pause_vm(name: &str) -> api::JobView = "POST" "/api/v1/vms/{name}/pause", &();
    /// Lets a VM go on.
    resume_vm(name: &str) -> api::JobView = "POST" "/api/v1/vms/{name}/resume", &();
    /// Moves a VM while it runs.
    migrate_vm(name: &str, to: Option<&str>) -> api::JobView =
        "POST" "/api/v1/vms/{name}/migrate", &api::MigrateVm { to: to.map(str::to_owned) };
    /// Asks a job to stop.
    cancel_job(id: u64) -> api::JobView = "POST" "/api/v1/jobs/{id}/cancel", &();
}
