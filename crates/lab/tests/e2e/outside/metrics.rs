//! `/metrics`, as Prometheus scrapes it: over HTTPS, with a token.

use std::collections::{BTreeMap, BTreeSet};

use holdfast_lab::cluster::Cluster;

use crate::bench::https;
use crate::shell::Shell;

pub fn prometheus_finds_the_figures(cluster: &Cluster) {
    let n1 = Shell::on(cluster, "n1");
    let token = n1.ok(&["token", "create", "prometheus"]).trim().to_owned();
    let ca = cluster.client("n1").cluster().unwrap().ca_certificate;
    let scrape = |address: &str, token: &str| {
        let head = format!("GET /metrics HTTP/1.1\r\nAuthorization: Bearer {token}");
        https(cluster, address, &ca, &head, "")
    };
    let refused = scrape("10.77.1.11", "guess");
    assert!(refused.starts_with("HTTP/1.1 403") && refused.contains("bad_token"), "{refused}");

    let coordinator = cluster.coordinator().unwrap();
    for (host, address) in [("n1", "10.77.1.11"), ("n2", "10.77.1.12")] {
        let answer = scrape(address, &token);
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 200"), "{head}");
        assert!(head.to_lowercase().contains("content-type: application/openmetrics-text; version=1.0.0"), "{head}");
        let figures = parse(body);
        let figure = |name: &str| *figures.get(name).unwrap_or_else(|| panic!("no {name} in {body}"));
        let view = cluster.client(host).cluster().unwrap();
        assert_eq!(figure(r#"holdfast_nodes{state="up"}"#), 2.0);
        assert_eq!(figure(r#"holdfast_node_up{node="n2"}"#), 1.0);
        assert!(figure(r#"holdfast_node_term{node="n1"}"#) >= 1.0);
        assert_eq!(figure("holdfast_lease_milliseconds"), view.lease_ms as f64);
        assert_eq!(figure("holdfast_is_coordinator"), f64::from(host == coordinator));
        assert_eq!(figure("holdfast_votes_needed"), view.quorum.needed as f64);
        assert_eq!(figure("holdfast_voters"), view.quorum.voters as f64);
        assert!(figure("holdfast_voters_connected") >= figure("holdfast_votes_needed"));
        assert_eq!(figure("holdfast_votes_spare"), 0.0);
        assert_eq!(figure(r#"holdfast_vms{state="off"}"#), 1.0);
        assert_eq!(figure(r#"holdfast_vm_up{vm="web"}"#), 0.0);
        assert!(figure(r#"holdfast_vm_epoch{vm="web"}"#) >= 1.0);
        assert_eq!(figure(r#"holdfast_jobs{work="create",state="done"}"#), 1.0);
        assert_eq!(figure(r#"holdfast_node_memory_bytes{node="n1"}"#), f64::from(1 << 30) * 4.0);
        assert_eq!(figure("holdfast_warnings"), view.warnings.len() as f64);
    }
}

/// Reads the OpenMetrics text format strictly, as far as gauges need it: each sample
/// follows the type of its family, comes once, and has a number; the end is marked.
fn parse(text: &str) -> BTreeMap<String, f64> {
    let body = text.strip_suffix("# EOF\n").unwrap_or_else(|| panic!("no end: {text}"));
    let mut types = BTreeSet::new();
    let mut figures = BTreeMap::new();
    for line in body.lines() {
        if let Some(comment) = line.strip_prefix("# ") {
            let words: Vec<&str> = comment.splitn(3, ' ').collect();
            match words[..] {
                ["TYPE", family, "gauge"] => assert!(types.insert(family.to_owned()), "twice: {line}"),
                ["HELP", _, help] => assert!(!help.is_empty(), "{line}"),
                _ => panic!("not understood: {line}"),
            }
            continue;
        }
        let (series, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("not understood: {line}"));
        let family = series.split('{').next().unwrap();
        assert!(types.contains(family), "{line} has no type");
        assert!(figures.insert(series.to_owned(), value.parse().unwrap()).is_none(), "twice: {line}");
    }
    figures
}
