//! What each command does. A refused command has changed nothing.

use crate::model::*;

use super::ClusterState;
use super::command::{Command, NewNode, Proposal, Refusal, Reply};
use super::votes::valid_site;

pub(super) type Executed = Result<Reply, Refusal>;

impl ClusterState {
    pub(super) fn execute(&mut self, proposal: &Proposal) -> Executed {
        let (at_ms, by) = (proposal.at_ms, proposal.by.as_str());
        if self.cluster.name.is_empty() && !matches!(proposal.command, Command::Found { .. }) {
            return Err(Refusal::Conflict("this host belongs to no cluster yet".into()));
        }
        match proposal.command.clone() {
            Command::Found { cluster, node } => self.found(at_ms, cluster, node),
            Command::AddJoinToken { digest, expires_ms } => {
                self.join_tokens.retain(|_, token| token.expires_ms > at_ms);
                self.join_tokens.insert(digest, JoinToken { expires_ms, used_by: None });
                Ok(Reply::Done)
            }
            Command::Join { digest, node } => self.join(at_ms, &digest, node),
            Command::RemoveNode { node } => self.remove_node(at_ms, by, node),
            Command::DrainNode { node, drained } => self.drain_node(at_ms, by, node, drained),
            Command::SetFacts { node, facts } => self.set_facts(node, facts),
            Command::SetFencing { node, fencing } => self.set_fencing(at_ms, by, node, fencing),
            Command::FenceTested { node, agent, test } => self.fence_tested(node, &agent, test),
            Command::AskFence { node } => self.ask_fence(at_ms, by, node),
            Command::FenceFailed { node, term, why } => self.fence_failed(at_ms, node, term, &why),
            Command::WatchdogLeft { node, device, timeout_s } => self.watchdog_left(at_ms, node, &device, timeout_s),
            Command::SetSite { node, site } => self.set_site(at_ms, by, node, site),
            Command::ForceQuorum { generation, node, with } => self.force_quorum(at_ms, by, generation, node, &with),
            Command::VotesMoved { voters } => Ok(self.votes_moved(at_ms, voters)),
            Command::SetWitness { disk, mark } => self.set_witness(at_ms, by, disk, mark),
            Command::ClearWitness => self.clear_witness(at_ms, by),
            Command::SetProfile { profile } => {
                let (old, new) = (self.settings.longest_lease, profile.timing());
                self.settings.profile = profile;
                if new.length_ms > old.length_ms {
                    self.settings.longest_lease = new;
                }
                self.event(at_ms, Severity::Info, "cluster", format!("{by} chose the failover profile {profile:?}"));
                Ok(Reply::Done)
            }
            Command::AddApiToken { name, digest } => {
                valid_name("token", &name)?;
                if self.api_tokens.contains_key(&name) {
                    return Err(Refusal::duplicate("token", &name));
                }
                self.event(at_ms, Severity::Info, format!("token {name}"), format!("{by} made it"));
                self.api_tokens.insert(name, ApiToken { digest, created_ms: at_ms });
                Ok(Reply::Done)
            }
            Command::RemoveApiToken { name } => {
                self.api_tokens.remove(&name).ok_or_else(|| Refusal::unknown("token", &name))?;
                self.event(at_ms, Severity::Info, format!("token {name}"), format!("{by} revoked it"));
                Ok(Reply::Done)
            }
            Command::SetNetwork { network, name, roles, metric } => self.set_network(&network, name, roles, metric),
            Command::AddSwitch { name, kind } => {
                valid_name("switch", &name)?;
                if self.switches.contains_key(&name) {
                    return Err(Refusal::duplicate("switch", &name));
                }
                self.event(at_ms, Severity::Info, format!("switch {name}"), format!("{by} added it"));
                self.switches.insert(name, kind);
                Ok(Reply::Done)
            }
            Command::RemoveSwitch { name } => {
                if !self.switches.contains_key(&name) {
                    return Err(Refusal::unknown("switch", &name));
                }
                if let Some(vm) = self.vms.values().find(|vm| vm.spec.nics.iter().any(|nic| nic.switch == name)) {
                    return Err(Refusal::Conflict(format!(
                        "switch {name:?} is used by VM {:?}: unplug it first",
                        vm.name
                    )));
                }
                self.switches.remove(&name);
                self.event(at_ms, Severity::Info, format!("switch {name}"), format!("{by} removed it"));
                Ok(Reply::Done)
            }
            Command::AddVolume { name, id, kind } => {
                valid_name("volume", &name)?;
                if self.volumes.contains_key(&name) {
                    return Err(Refusal::duplicate("volume", &name));
                }
                if let Some((other, _)) = self.volumes.iter().find(|(_, volume)| volume.kind == kind) {
                    let what = match kind {
                        VolumeKind::Directory { .. } => "directory",
                        VolumeKind::Lun { .. } => "device",
                    };
                    return Err(Refusal::Conflict(format!("volume {other:?} is on the same {what} already")));
                }
                self.event(at_ms, Severity::Info, format!("volume {name}"), format!("{by} added it"));
                if let VolumeKind::Lun { slab_bytes, slabs, .. } = &kind {
                    self.luns.insert(name.clone(), Lun::new(*slab_bytes, *slabs));
                }
                self.volumes.insert(name, Volume { id, kind, added_ms: at_ms });
                Ok(Reply::Done)
            }
            Command::RemoveVolume { name } => {
                if !self.volumes.contains_key(&name) {
                    return Err(Refusal::unknown("volume", &name));
                }
                if let Some(vm) = self.vms.values().find(|vm| vm.spec.uses_volume(&name)) {
                    return Err(Refusal::Conflict(format!(
                        "volume {name:?} holds disks of VM {:?}: delete it first",
                        vm.name
                    )));
                }
                self.has_no_holds(&name)?;
                self.volumes.remove(&name);
                self.luns.remove(&name);
                self.event(at_ms, Severity::Info, format!("volume {name}"), format!("{by} removed it; its files stay"));
                Ok(Reply::Done)
            }
            Command::RenameVolume { name, new } => self.rename_volume(at_ms, by, &name, &new),
            Command::SetOwner { volume, node } => self.set_owner(at_ms, by, &volume, node),
            Command::SetRedirect { volume, node, redirect } => self.set_redirect(at_ms, by, &volume, node, redirect),
            Command::SetRedirectPatience { seconds } => {
                self.settings.redirect_patience_s = seconds;
                let text = format!("{by} lets VMs leave a node whose I/O has been redirected for {seconds} s");
                self.event(at_ms, Severity::Info, "cluster", text);
                Ok(Reply::Done)
            }
            Command::TakeSlabs { volume, node, term, known, most } => {
                self.take_slabs(&volume, node, term, &known, most)
            }
            Command::MapSlabs { vm, disk, tenure, wanted, takings } => {
                self.map_slabs(vm, disk, &tenure, &wanted, &takings)
            }
            Command::UnmapSlabs { vm, disk, tenure, number, parts } => {
                self.unmap_slabs(vm, disk, &tenure, number, &parts)
            }
            Command::VoidUnmaps { node } => Ok(self.void_unmaps(node)),
            Command::ClaimJournal { volume, writer } => self.claim_journal(&volume, writer),
            Command::JournalWritten { volume, writer, outcome, repaired, ends } => {
                self.journal_written(at_ms, &volume, writer, outcome, repaired, ends)
            }
            Command::RepairVolume { name } => self.repair_volume(at_ms, by, &name),
            Command::ImportVolume { name, id, kind, journal } => {
                self.import_volume(at_ms, by, &name, id, kind, journal)
            }
            Command::ImportFiles { volume, files, last } => self.import_files(at_ms, &volume, files, last),
            Command::HoldFile { id, volume, node, term, what } => self.hold_file(id, &volume, node, term, &what),
            Command::EndHold { id, naming } => self.end_hold(at_ms, by, id, naming.as_ref()),
            Command::RemoveFile { volume, name } => self.remove_file(at_ms, by, &volume, &name),
            Command::CreateVm { id, name, spec, node, sources } => {
                self.create_vm(at_ms, by, id, name, spec, node, sources)
            }
            Command::SetDesired { vm, desired } => self.set_desired(at_ms, by, vm, desired),
            Command::RestartVm { vm } => self.restart_vm(at_ms, by, vm),
            Command::DeleteVm { vm, node } => self.delete_vm(at_ms, by, vm, node),
            Command::MigrateVm { vm, to } => self.migrate_vm(at_ms, by, vm, to),
            Command::CancelJob { job } => self.cancel_job(at_ms, by, job),
            Command::Decide { revision, decisions } => {
                if revision != self.revision {
                    return Err(Refusal::Stale { planned: revision, current: self.revision });
                }
                for decision in &decisions {
                    self.decide(at_ms, decision);
                }
                Ok(Reply::Done)
            }
        }
    }

    fn found(&mut self, at_ms: u64, cluster: Cluster, node: NewNode) -> Executed {
        if !self.cluster.name.is_empty() {
            return Err(Refusal::AlreadyFounded { name: self.cluster.name.clone() });
        }
        valid_name("cluster", &cluster.name)?;
        valid_name("node", &node.name)?;
        valid_site(node.site.as_deref())?;
        self.event(at_ms, Severity::Info, "cluster", format!("{} founded it as {:?}", node.name, cluster.name));
        self.cluster = cluster;
        Ok(Reply::Node(self.admit_host(at_ms, node)))
    }

    fn join(&mut self, at_ms: u64, digest: &str, node: NewNode) -> Executed {
        let bad = |text: &str| Err(Refusal::Token(format!("{text}: make a new one with `holdfast node token`")));
        match self.join_tokens.get(digest) {
            None => return bad("this join token was never issued here, or expired long ago"),
            Some(JoinToken { used_by: Some(host), .. }) => {
                return bad(&format!("this join token was used by {host} already"));
            }
            Some(token) if token.expires_ms <= at_ms => return bad("this join token has expired"),
            Some(_) => {}
        }
        valid_name("node", &node.name)?;
        valid_site(node.site.as_deref())?;
        if self.node_named(&node.name).is_some() {
            return Err(Refusal::duplicate("node", &node.name));
        }
        if let Some(token) = self.join_tokens.get_mut(digest) {
            token.used_by = Some(node.name.clone());
        }
        self.event(at_ms, Severity::Info, format!("node {}", node.name), "joined the cluster");
        Ok(Reply::Node(self.admit_host(at_ms, node)))
    }

    fn admit_host(&mut self, at_ms: u64, new: NewNode) -> NodeId {
        let id = NodeId(self.last_node.0 + 1);
        self.last_node = id;
        let node = Node {
            id,
            name: new.name,
            port: new.port,
            heartbeat_port: new.heartbeat_port,
            heartbeat_key: new.heartbeat_key,
            membership: Membership::Joined,
            term: NodeTerm(0),
            incarnation: Incarnation(0),
            facts: new.facts,
            joined_ms: at_ms,
            site: new.site,
            drained_ms: None,
            leaves: false,
        };
        self.nodes.insert(id, node);
        self.find_networks();
        id
    }

    fn remove_node(&mut self, at_ms: u64, by: &str, id: NodeId) -> Executed {
        let node = self.nodes.get(&id).ok_or_else(|| Refusal::unknown("node", id))?;
        let (name, up) = (node.name.clone(), node.is_up());
        if node.leaves {
            return Ok(Reply::Done);
        }
        if let Some(vm) = self.vms.values().find(|vm| vm.tenures().any(|t| t.node == id && !self.is_void(t))) {
            return Err(Refusal::Conflict(format!(
                "VM {:?} is on node {name:?}: move it away or shut it down first",
                vm.name
            )));
        }
        let works = |vm: &&Vm| match vm.disks {
            DiskStage::Making { node, .. } | DiskStage::Deleting { node, .. } => up && node == id,
            DiskStage::Ready => false,
        };
        if let Some(vm) = self.vms.values().find(works) {
            return Err(Refusal::Conflict(format!(
                "node {name:?} works on the disks of VM {:?}: wait until it is done (`holdfast job list`)",
                vm.name
            )));
        }
        // Its right would be over at once, and its lease is not: what it does for others
        // could come after what the next owner does.
        let owns = |lun: &Lun| lun.access.owner.is_some_and(|owner| owner.node == id && !self.is_owner_void(&owner));
        if let Some((volume, _)) = self.luns.iter().find(|(_, lun)| owns(lun)) {
            return Err(Refusal::Conflict(format!(
                "node {name:?} owns volume {volume:?}: give it to another one first (`holdfast volume set-owner {volume} NODE`)"
            )));
        }
        if let Some((volume, ..)) = self.holds_of(id).next() {
            return Err(Refusal::Conflict(format!(
                "node {name:?} has a file of volume {volume:?} open: wait until that is copied"
            )));
        }
        if !self.nodes.values().any(|other| other.id != id && !other.leaves) {
            return Err(Refusal::Conflict(format!("node {name:?} is the last one of the cluster")));
        }
        self.event(at_ms, Severity::Info, format!("node {name}"), format!("{by} removes it"));
        match self.nodes.get_mut(&id) {
            // It may zero slabs and write a journal until its lease has ended.
            Some(node) if up => node.leaves = true,
            _ => self.forget_node(at_ms, id),
        }
        Ok(Reply::Done)
    }

    /// A node that was to be removed has no right to anything any more.
    pub(super) fn forget_node(&mut self, at_ms: u64, id: NodeId) {
        let Some(node) = self.nodes.remove(&id) else { return };
        self.fencing.remove(&id);
        self.luns.values_mut().for_each(|lun| lun.access.forget(id));
        self.find_networks();
        self.event(at_ms, Severity::Info, format!("node {}", node.name), "is no node any more");
    }

    fn set_facts(&mut self, id: NodeId, facts: NodeFacts) -> Executed {
        let node = self.nodes.get_mut(&id).ok_or_else(|| Refusal::unknown("node", id))?;
        node.facts = facts;
        self.find_networks();
        Ok(Reply::Done)
    }

    /// Names every subnet that a node has an address in; forgets those that are gone.
    pub(super) fn find_networks(&mut self) {
        let subnets: std::collections::BTreeSet<_> =
            self.nodes.values().flat_map(|node| &node.facts.addresses).map(subnet).collect();
        self.networks.retain(|known, _| subnets.contains(known));
        for found in subnets {
            if self.networks.contains_key(&found) {
                continue;
            }
            let free = (1..).map(|n| format!("network-{n}"));
            let taken = |name: &String| self.networks.values().any(|network| network.name == *name);
            let Some(name) = free.into_iter().find(|name| !taken(name)) else {
                continue;
            };
            let roles = Roles { cluster: true, migration: true };
            self.networks.insert(found, Network { name, roles, metric: 100 });
        }
    }

    fn set_network(
        &mut self,
        which: &str,
        name: Option<String>,
        roles: Option<Roles>,
        metric: Option<u32>,
    ) -> Executed {
        let key = self
            .networks
            .iter()
            .find(|(subnet, network)| network.name == which || *subnet == which)
            .map(|(subnet, _)| subnet.clone())
            .ok_or_else(|| Refusal::unknown("network", which))?;
        if let Some(name) = &name {
            valid_name("network", name)?;
            if self.networks.iter().any(|(subnet, network)| network.name == *name && *subnet != key) {
                return Err(Refusal::duplicate("network", name));
            }
        }
        let loses_cluster = roles.is_some_and(|roles| !roles.cluster);
        if loses_cluster && !self.networks.iter().any(|(subnet, network)| network.roles.cluster && *subnet != key) {
            return Err(Refusal::Conflict("at least one network has to carry the cluster's own traffic".into()));
        }
        if let Some(network) = self.networks.get_mut(&key) {
            network.name = name.unwrap_or_else(|| network.name.clone());
            network.roles = roles.unwrap_or(network.roles);
            network.metric = metric.unwrap_or(network.metric);
        }
        Ok(Reply::Done)
    }
}

/// A name that is safe in paths, on command lines and in URLs.
///
/// # Errors
/// [`Refusal::Invalid`] says what a name looks like.
pub fn valid_name(what: &str, name: &str) -> Result<(), Refusal> {
    let first = name.chars().next().is_some_and(|c| c.is_ascii_alphanumeric());
    let rest = name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'));
    if first && rest && name.len() <= 63 {
        return Ok(());
    }
    Err(Refusal::Invalid(format!(
        "{name:?} cannot be the name of a {what}: a name is 1 to 63 letters, digits, '-', '_' or '.', and begins with a letter or digit"
    )))
}
