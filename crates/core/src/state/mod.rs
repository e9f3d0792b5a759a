//! The one truth: the replicated state and how it changes.

mod access;
mod command;
mod commands;
mod decisions;
mod drain;
mod fencing;
mod files;
mod generation;
mod jobs;
mod journals;
mod luns;
mod vms;
mod votes;
mod witness;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use serde::{Deserialize, Serialize};

use crate::model::*;

pub use command::{Command, NewNode, Proposal, Refusal, Reply};
pub use commands::valid_name;
pub use files::{Holding, Naming, valid_file_name};

/// How many events are kept.
const EVENTS_KEPT: usize = 1000;
/// How many ended jobs are kept.
const JOBS_KEPT: usize = 200;
/// How many answered requests are remembered, to recognise a retry.
const REQUESTS_KEPT: usize = 512;
/// How many causes each VM remembers.
const CAUSES_KEPT: usize = 16;

/// Everything that the cluster agrees on.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ClusterState {
    /// Counts applied commands.
    pub revision: u64,
    /// What makes this cluster this cluster; empty before it was founded.
    pub cluster: Cluster,
    /// Which of its histories this is.
    #[serde(default)]
    pub generation: Generation,
    /// What its administrators chose.
    pub settings: Settings,
    /// Its nodes.
    pub nodes: BTreeMap<NodeId, Node>,
    /// The last node id that was given.
    pub last_node: NodeId,
    /// Who votes in consensus, as the coordinator told last: for the events that say
    /// which votes moved. Consensus keeps the list that counts.
    #[serde(default)]
    pub voters: BTreeSet<NodeId>,
    /// The vote without a host.
    #[serde(default)]
    pub witness: Option<Witness>,
    /// How many disks have been a witness so far: each gets a number of its own.
    #[serde(default)]
    pub last_witness: u64,
    /// The last disk that was a witness before: it is hosted until its vote is gone.
    #[serde(default)]
    pub former_witness: Option<Witness>,
    /// Tokens to join with, by the SHA-256 of the token.
    pub join_tokens: BTreeMap<String, JoinToken>,
    /// Tokens to use the API with, by name.
    pub api_tokens: BTreeMap<String, ApiToken>,
    /// Networks, by subnet.
    pub networks: BTreeMap<String, Network>,
    /// Virtual switches, by name.
    pub switches: BTreeMap<String, SwitchKind>,
    /// Volumes, by name.
    pub volumes: BTreeMap<String, Volume>,
    /// The slabs of volumes on LUNs, by the volume's name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub luns: BTreeMap<String, Lun>,
    /// How nodes' hosts can be switched off.
    #[serde(default)]
    pub fencing: BTreeMap<NodeId, PowerFencing>,
    /// Virtual machines.
    pub vms: BTreeMap<VmId, Vm>,
    /// Jobs, those that go on and the last ones that ended.
    pub jobs: BTreeMap<JobId, Job>,
    /// The last job id that was given.
    pub last_job: JobId,
    /// What happened lately, oldest first.
    pub events: VecDeque<Event>,
    /// The last event's index.
    pub last_event: u64,
    /// Requests that were answered lately, oldest first.
    answered: VecDeque<(RequestId, Reply)>,
}

impl ClusterState {
    /// Applies a committed proposal. Deterministic: the same state and proposal
    /// give the same result on every node. A proposal that was applied before
    /// changes nothing and gets the same reply.
    pub fn apply(&mut self, proposal: &Proposal) -> Reply {
        if let Some((_, reply)) = self.answered.iter().rev().find(|(id, _)| *id == proposal.id) {
            return reply.clone();
        }
        let reply = match self.execute(proposal) {
            Ok(reply) => reply,
            Err(refusal) => Reply::Refused(refusal),
        };
        self.tell_fullness(proposal.at_ms);
        // No decision stands on who has which slab: a guest that writes must not make
        // the coordinator decide again. Nor is it remembered, since doing it twice does
        // no harm: such a guest would drive out requests that are still retried.
        if proposal.command.is_bookkeeping() {
            return reply;
        }
        self.revision += 1;
        self.end_void_holds();
        self.settle_jobs(proposal.at_ms);
        self.answered.push_back((proposal.id, reply.clone()));
        while self.answered.len() > REQUESTS_KEPT {
            self.answered.pop_front();
        }
        reply
    }

    /// A copy to try decisions on: without what happened before and who has which slab,
    /// of which nothing follows and which is most of the state.
    pub(crate) fn without_history(&self) -> Self {
        ClusterState {
            revision: self.revision,
            cluster: self.cluster.clone(),
            generation: self.generation,
            settings: self.settings.clone(),
            nodes: self.nodes.clone(),
            last_node: self.last_node,
            fencing: self.fencing.clone(),
            witness: self.witness.clone(),
            last_witness: self.last_witness,
            former_witness: self.former_witness.clone(),
            voters: self.voters.clone(),
            join_tokens: BTreeMap::new(),
            api_tokens: BTreeMap::new(),
            networks: self.networks.clone(),
            switches: self.switches.clone(),
            volumes: self.volumes.clone(),
            luns: self.luns.iter().map(|(name, lun)| (name.clone(), lun.without_slabs())).collect(),
            vms: self.vms.clone(),
            jobs: self.running_jobs().map(|job| (job.id, job.clone())).collect(),
            last_job: self.last_job,
            events: VecDeque::new(),
            last_event: self.last_event,
            answered: VecDeque::new(),
        }
    }

    /// The node with this name.
    pub fn node_named(&self, name: &str) -> Option<&Node> {
        self.nodes.values().find(|node| node.name == name)
    }

    /// A node's name for messages; its number when it is gone.
    pub fn node_name(&self, id: NodeId) -> String {
        self.nodes.get(&id).map_or_else(|| format!("node {id}"), |node| node.name.clone())
    }

    /// The VM with this name.
    pub fn vm_named(&self, name: &str) -> Option<&Vm> {
        self.vms.values().find(|vm| vm.name == name)
    }

    /// Whether a node is in a term: every right that it was given in another is void.
    pub fn is_in_term(&self, node: NodeId, term: NodeTerm) -> bool {
        self.nodes.get(&node).is_some_and(|node| node.is_up() && node.term == term)
    }

    /// Whether a right to run a VM is void: its node is gone, lost, or was
    /// admitted anew since.
    pub fn is_void(&self, tenure: &Tenure) -> bool {
        !self.is_in_term(tenure.node, tenure.term)
    }

    /// Whether the right of a volume's owner is void.
    pub fn is_owner_void(&self, owner: &Owner) -> bool {
        !self.is_in_term(owner.node, owner.term)
    }

    /// The name of the volume with this identity.
    pub fn volume_named_by(&self, id: uuid::Uuid) -> Option<&String> {
        self.volumes.iter().find(|(_, volume)| volume.id == id).map(|(name, _)| name)
    }

    /// A full volume that a VM has a disk on.
    pub fn full_volume<'a>(&self, spec: &'a VmSpec) -> Option<&'a str> {
        let full = |disk: &&DiskSpec| self.luns.get(&disk.volume).is_some_and(|lun| lun.free_slabs() == 0);
        spec.disks.iter().find(full).map(|disk| disk.volume.as_str())
    }

    /// Who owns a volume, if its right is not void.
    pub fn owner(&self, volume: &str) -> Option<&Owner> {
        self.luns.get(volume)?.access.owner.as_ref().filter(|owner| !self.is_owner_void(owner))
    }

    /// What a node said in the term that it is in of its path to a volume on a LUN.
    pub fn reached(&self, volume: &str, node: NodeId) -> Option<&Reached> {
        let node = self.nodes.get(&node).filter(|node| node.is_up())?;
        self.luns.get(volume)?.access.reached(node.id, node.term)
    }

    /// The jobs that go on.
    pub fn running_jobs(&self) -> impl Iterator<Item = &Job> {
        self.jobs.values().filter(|job| job.end.is_none())
    }

    fn event(&mut self, at_ms: u64, severity: Severity, subject: impl Into<String>, text: impl Into<String>) {
        self.last_event += 1;
        self.events.push_back(Event {
            index: self.last_event,
            at_ms,
            severity,
            subject: subject.into(),
            text: text.into(),
        });
        while self.events.len() > EVENTS_KEPT {
            self.events.pop_front();
        }
    }
}

impl Vm {
    /// Remembers why something was decided, for `holdfast explain`.
    fn remember(&mut self, at_ms: u64, what: impl Into<String>, cause: Cause) {
        self.causes.push(Because { at_ms, what: what.into(), cause });
        if self.causes.len() > CAUSES_KEPT {
            self.causes.remove(0);
        }
    }

    /// Keeps of many tries that found a disk locked only the last.
    fn remember_try(&mut self, at_ms: u64, what: &str, cause: &Cause) {
        self.causes.pop_if(|last| matches!(last.cause, Cause::DiskLocked { .. }));
        self.remember(at_ms, what, cause.clone());
    }
}
