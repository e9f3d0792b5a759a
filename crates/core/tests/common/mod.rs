//! A small cluster, made the way a real one is: by applying commands.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use holdfast_core::plan::plan;
use holdfast_core::*;
use uuid::Uuid;

/// A day in 2026, in milliseconds since the Unix epoch.
pub const NOW: u64 = 1_790_000_000_000;

pub struct Lab {
    pub state: ClusterState,
    pub observed: Observed,
    pub now_ms: u64,
    requests: u128,
}

pub fn facts(memory_mib: u64) -> NodeFacts {
    NodeFacts {
        cpus: 4,
        memory_bytes: memory_mib << 20,
        qemu: Some("7.2.0".into()),
        machines: vec!["pc-q35-7.2".into()],
        version: "0.1.0".into(),
        ..NodeFacts::default()
    }
}

pub fn new_node(name: &str, memory_mib: u64) -> NewNode {
    NewNode {
        name: name.into(),
        port: 7001,
        heartbeat_port: 7002,
        heartbeat_key: [7; 32],
        facts: facts(memory_mib),
        site: None,
    }
}

pub fn spec(memory_mib: u64, priority: Priority) -> VmSpec {
    VmSpec {
        cpus: 1,
        memory_bytes: memory_mib << 20,
        machine: "pc-q35-7.2".into(),
        cpu_model: None,
        direct_boot: None,
        disks: vec![DiskSpec {
            volume: "vol1".into(),
            file: "disk0.qcow2".into(),
            size_bytes: 1 << 30,
            format: DiskFormat::Qcow2,
            allocation: Allocation::Thin,
        }],
        nics: Vec::new(),
        priority,
        stop_timeout_s: 10,
    }
}

pub const fn vm_id(number: u128) -> VmId {
    VmId(Uuid::from_u128(number))
}

pub const WEB: VmId = vm_id(0x3eb);

impl Lab {
    /// So many nodes with 2 GiB for VMs each, all up in term 1.
    pub fn new(nodes: u64) -> Self {
        let mut lab = Lab { state: ClusterState::default(), observed: Observed::default(), now_ms: NOW, requests: 0 };
        let cluster = Cluster {
            name: "lab".into(),
            id: Uuid::from_u128(1),
            founded_ms: NOW,
            ca_certificate: "certificate".into(),
            ca_key: "key".into(),
        };
        assert_eq!(lab.ask(Command::Found { cluster, node: new_node("n1", 2048) }), Reply::Node(NodeId(1)));
        for number in 2..=nodes {
            let digest = format!("{number}");
            lab.ask(Command::AddJoinToken { digest: digest.clone(), expires_ms: NOW + 60_000 });
            let joined = lab.ask(Command::Join { digest, node: new_node(&format!("n{number}"), 2048) });
            assert_eq!(joined, Reply::Node(NodeId(number)));
        }
        let kind = VolumeKind::Directory { path: "/srv/vol1".into() };
        lab.ask(Command::AddVolume { name: "vol1".into(), id: Uuid::from_u128(2), kind });
        for node in 1..=nodes {
            lab.hear(node, 100 + node);
        }
        lab.plan();
        assert!(lab.state.nodes.values().all(Node::is_up));
        lab
    }

    pub fn ask(&mut self, command: Command) -> Reply {
        self.requests += 1;
        let id = RequestId(Uuid::from_u128(self.requests));
        self.state.apply(&Proposal { id, at_ms: self.now_ms, by: "anna".into(), command })
    }

    /// A keeper of this life asks for a lease.
    pub fn hear(&mut self, node: u64, life: u64) {
        self.observed.nodes.entry(NodeId(node)).or_default().heard = Some(Incarnation(life));
    }

    /// Its lease has certainly ended, and nobody is heard there.
    pub fn lose(&mut self, node: u64) {
        let seen = self.observed.nodes.entry(NodeId(node)).or_default();
        (seen.lease_ended, seen.silent_ms, seen.heard, seen.report) = (true, 1700, None, None);
    }

    /// The node says this of its QEMU of `vm` in the epoch that it has a right to.
    pub fn say(&mut self, node: u64, vm: VmId, run: Run) {
        let known = self.state.nodes[&NodeId(node)].clone();
        let epoch = self.state.vms[&vm].tenure_of(known.id).expect("a right").epoch;
        let seen = self.observed.nodes.entry(known.id).or_default();
        let report = seen.report.get_or_insert_default();
        (report.incarnation, report.term) = (known.incarnation, known.term);
        report.vms.insert(vm, VmReport { epoch, run, moved: None });
    }

    /// Plans, has the plan judged and applies it; returns its actions.
    pub fn plan(&mut self) -> Vec<Action> {
        let plan = plan(&self.state, &self.observed, self.now_ms);
        assert_eq!(holdfast_core::check::check(&self.state, &plan), Ok(()));
        let actions = plan.decisions.iter().map(|decision| decision.action.clone()).collect();
        if !plan.decisions.is_empty() {
            let command = Command::Decide { revision: plan.revision, decisions: plan.decisions };
            assert_eq!(self.ask(command), Reply::Done);
        }
        actions
    }

    /// A VM whose disks are there and that is to run.
    pub fn create(&mut self, id: VmId, name: &str, spec: VmSpec) -> JobId {
        let sources = Sources { start: true, ..Sources::default() };
        let reply = self.ask(Command::CreateVm { id, name: name.into(), spec, node: NodeId(1), sources });
        let Reply::Job(job) = reply else { panic!("{reply:?}") };
        let known = self.state.nodes[&NodeId(1)].clone();
        let report = self.observed.nodes.entry(NodeId(1)).or_default().report.get_or_insert_default();
        (report.incarnation, report.term) = (known.incarnation, known.term);
        report.work.insert(job, WorkReport { progress: Progress::default(), end: Some(Ok(())) });
        self.plan();
        job
    }

    /// `web` runs on the node that is returned.
    pub fn running_web(&mut self, priority: Priority) -> u64 {
        self.create(WEB, "web", spec(512, priority));
        self.plan();
        let node = self.on(WEB).expect("placed");
        self.say(node, WEB, Run::Running);
        self.plan();
        assert_eq!(self.state.vms[&WEB].seen, Seen::Running);
        node
    }

    pub fn on(&self, vm: VmId) -> Option<u64> {
        match self.state.vms[&vm].placement {
            Placement::On(tenure) => Some(tenure.node.0),
            _ => None,
        }
    }

    pub fn outcome(&self, job: JobId) -> Option<Outcome> {
        self.state.jobs[&job].end.clone().map(|end| end.outcome)
    }

    pub fn job(&mut self, command: Command) -> JobId {
        match self.ask(command) {
            Reply::Job(job) => job,
            other => panic!("{other:?}"),
        }
    }
}
