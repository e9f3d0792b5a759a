//! The cluster from outside: the command line on a machine that is no node, metrics,
//! streams, JSON for programs, and disks that are made from images. One cluster for
//! all of them: none disturbs another.

mod afar;
mod images;
mod json;
mod metrics;
mod streams;

use holdfast_lab::cluster::VmTemplate;

use crate::bench::{form, spec};

#[test]
fn a_cluster_serves_people_and_programs_outside_it() {
    let mut spec = spec();
    spec.nodes = 2;
    let (cluster, _turn) = form(spec);
    cluster.create_vm_unawaited(&VmTemplate::new("web", 101).off()).unwrap();
    afar::the_command_line_works_from_afar(&cluster);
    metrics::prometheus_finds_the_figures(&cluster);
    streams::changes_and_events_are_told_and_resumed(&cluster);
    images::disks_are_made_from_images(&cluster);
    json::everything_shown_is_shown_to_programs_too(&cluster);
}
