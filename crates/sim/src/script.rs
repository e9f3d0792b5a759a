//! What happens to a world from outside: commands of users, and faults. As text it
//! is the language of the scenario files.

use std::fmt;
use std::str::FromStr;

use holdfast_core::{Priority, Profile};

use crate::role;

/// Something that happens at a moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// When, in milliseconds of true time.
    pub at_ms: u64,
    /// What.
    pub deed: Deed,
}

/// What can happen. Nodes are numbered from zero here and from one in text; a role
/// may stand where a node stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Deed {
    /// A user asks for it through the API.
    Ask(Wish),
    /// Something breaks or heals.
    Fault(Fault),
}

/// What a user asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wish {
    /// Creates a VM and starts it.
    Create {
        /// Its name.
        vm: String,
        /// Its memory in MiB.
        memory_mib: u64,
        /// Its priority.
        priority: Priority,
    },
    /// Starts or resumes it.
    Start(String),
    /// Shuts it down.
    Stop(String),
    /// Switches it off.
    Force(String),
    /// Pauses it.
    Pause(String),
    /// Restarts it.
    Restart(String),
    /// Deletes it.
    Delete(String),
    /// Moves it, to the best node when none is named.
    Migrate(String, Option<usize>),
    /// Cancels its migration or its shut-down.
    Cancel(String),
    /// Removes a node.
    Remove(usize),
    /// Empties a node for maintenance.
    Drain(usize),
    /// Lets VMs come to it again.
    Resume(usize),
    /// Says how much memory a node has for VMs, in MiB.
    Memory(usize, u64),
    /// Chooses how fast a lost node is noticed.
    Profile(Profile),
    /// Wants a volume on a LUN owned by a node; LUNs are numbered as nodes are.
    Own(usize, usize),
}

/// Which traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Traffic {
    /// All of it.
    All,
    /// Heartbeats and grants.
    Heartbeats,
    /// Consensus, reports, proposals and words between agents.
    Agents,
    /// Migration streams.
    Migration,
}

/// What breaks or heals.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Whoever plays a role from now on is who does so now.
    Cast,
    /// A host loses its power.
    Lose(usize),
    /// It does so, and nothing that it has sent arrives, when it is next agreed on
    /// that a node is lost.
    LoseAtVerdict(usize),
    /// A host boots, with what was durable.
    Return(usize),
    /// Nothing gets from one to the other any more.
    Cut(usize, usize, Traffic),
    /// It does again.
    Join(usize, usize, Traffic),
    /// An agent dies and is started again.
    CrashAgent(usize),
    /// An agent dies and is started again so many milliseconds later.
    RestartAgent(usize, u64),
    /// A keeper dies, and its VMs with it, and is started again.
    CrashKeeper(usize),
    /// An agent stands still, and later goes on where it was.
    FreezeAgent(usize),
    /// It goes on.
    ThawAgent(usize),
    /// A keeper stands still while its VMs run on.
    FreezeKeeper(usize),
    /// It goes on.
    ThawKeeper(usize),
    /// A whole host stands still; its clock shows the time that passed.
    Suspend(usize),
    /// It goes on.
    Wake(usize),
    /// A VM's QEMU dies.
    Crash(String),
    /// A guest shuts itself down.
    Shutdown(String),
    /// A host's disk takes this many milliseconds for each write.
    SlowDisk(usize, u64),
    /// Of a thousand messages this many are lost, doubled, and late by up to so many milliseconds.
    Storm(u64, u64, u64),
    /// A host does not reach a LUN by itself.
    CutPath(usize, usize),
    /// It does again.
    JoinPath(usize, usize),
    /// A host cannot reach the witness's disk.
    CutDisk(usize),
    /// It can again.
    JoinDisk(usize),
    /// An access to the witness's disk takes so many milliseconds longer.
    SlowWitness(u64),
    /// The witness's disk is copied as it is.
    CopyDisk,
    /// The copy takes the place of the witness's disk, if every node has seen more since.
    OldDisk,
    /// A host's wall clock jumps by so many milliseconds.
    SetClock(usize, i64),
    /// Everything is as it should be again.
    Heal,
}

impl Deed {
    /// Whether the keeper's clockwork stands still while its VMs may run: what
    /// the image locks are the second line of defence for.
    pub fn stops_a_keeper(&self) -> bool {
        matches!(self, Deed::Fault(Fault::FreezeKeeper(_) | Fault::Suspend(_)))
    }
}

fn priority(priority: Priority) -> &'static str {
    match priority {
        Priority::None => "none",
        Priority::Low => "low",
        Priority::Medium => "medium",
        Priority::High => "high",
    }
}

fn profile(profile: Profile) -> &'static str {
    match profile {
        Profile::Default => "default",
        Profile::Fast => "fast",
        Profile::Wan => "wan",
    }
}

impl fmt::Display for Traffic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Traffic::All => "",
            Traffic::Heartbeats => " heartbeats",
            Traffic::Agents => " agents",
            Traffic::Migration => " migration",
        })
    }
}

impl fmt::Display for Deed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let n = |node: &usize| role::written(*node);
        match self {
            Deed::Ask(wish) => match wish {
                Wish::Create { vm, memory_mib, priority: of } => {
                    write!(f, "vm {vm} {memory_mib}M {}", priority(*of))
                }
                Wish::Start(vm) => write!(f, "start {vm}"),
                Wish::Stop(vm) => write!(f, "stop {vm}"),
                Wish::Force(vm) => write!(f, "force {vm}"),
                Wish::Pause(vm) => write!(f, "pause {vm}"),
                Wish::Restart(vm) => write!(f, "restart {vm}"),
                Wish::Delete(vm) => write!(f, "delete {vm}"),
                Wish::Migrate(vm, Some(to)) => write!(f, "migrate {vm} {}", n(to)),
                Wish::Migrate(vm, None) => write!(f, "migrate {vm}"),
                Wish::Cancel(vm) => write!(f, "cancel {vm}"),
                Wish::Remove(node) => write!(f, "remove {}", n(node)),
                Wish::Drain(node) => write!(f, "drain {}", n(node)),
                Wish::Resume(node) => write!(f, "resume {}", n(node)),
                Wish::Memory(node, mib) => write!(f, "memory {} {mib}M", n(node)),
                Wish::Profile(of) => write!(f, "profile {}", profile(*of)),
                Wish::Own(volume, node) => write!(f, "own {} {}", lun(*volume), n(node)),
            },
            Deed::Fault(fault) => match fault {
                Fault::Cast => write!(f, "cast"),
                Fault::Lose(node) => write!(f, "lose {}", n(node)),
                Fault::LoseAtVerdict(node) => write!(f, "lose-at-verdict {}", n(node)),
                Fault::Return(node) => write!(f, "return {}", n(node)),
                Fault::Cut(from, to, what) => write!(f, "cut {} to {}{what}", n(from), n(to)),
                Fault::Join(from, to, what) => write!(f, "join {} to {}{what}", n(from), n(to)),
                Fault::CrashAgent(node) => write!(f, "crash-agent {}", n(node)),
                Fault::RestartAgent(node, ms) => write!(f, "restart-agent {} {ms}ms", n(node)),
                Fault::CrashKeeper(node) => write!(f, "crash-keeper {}", n(node)),
                Fault::FreezeAgent(node) => write!(f, "freeze-agent {}", n(node)),
                Fault::ThawAgent(node) => write!(f, "thaw-agent {}", n(node)),
                Fault::FreezeKeeper(node) => write!(f, "freeze-keeper {}", n(node)),
                Fault::ThawKeeper(node) => write!(f, "thaw-keeper {}", n(node)),
                Fault::Suspend(node) => write!(f, "suspend {}", n(node)),
                Fault::Wake(node) => write!(f, "wake {}", n(node)),
                Fault::Crash(vm) => write!(f, "crash {vm}"),
                Fault::Shutdown(vm) => write!(f, "shutdown {vm}"),
                Fault::SlowDisk(node, ms) => write!(f, "slow-disk {} {ms}ms", n(node)),
                Fault::Storm(lost, doubled, late) => write!(f, "storm {lost} {doubled} {late}ms"),
                Fault::CutPath(node, to) => write!(f, "cut-path {} to {}", n(node), lun(*to)),
                Fault::JoinPath(node, to) => write!(f, "join-path {} to {}", n(node), lun(*to)),
                Fault::CutDisk(node) => write!(f, "cut-disk {}", n(node)),
                Fault::JoinDisk(node) => write!(f, "join-disk {}", n(node)),
                Fault::SlowWitness(ms) => write!(f, "slow-witness {ms}ms"),
                Fault::CopyDisk => write!(f, "copy-disk"),
                Fault::OldDisk => write!(f, "old-disk"),
                Fault::SetClock(node, ms) => write!(f, "set-clock {} {ms}", n(node)),
                Fault::Heal => write!(f, "heal"),
            },
        }
    }
}

/// A line that is not understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NotUnderstood {
    /// Its number, from one; zero where there is no file.
    pub line: usize,
    /// What is wrong with it.
    pub why: String,
}

impl fmt::Display for NotUnderstood {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.why)
    }
}

impl std::error::Error for NotUnderstood {}

/// A scenario file: how many nodes of what size, and what happens to them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scenario {
    /// How many nodes.
    pub nodes: usize,
    /// Memory for VMs on each, in MiB.
    pub memory_mib: u64,
    /// There is a witness.
    pub witness: bool,
    /// What happens, in order of time.
    pub steps: Vec<Step>,
    /// When it ends, in milliseconds.
    pub end_ms: u64,
}

impl FromStr for Scenario {
    type Err = NotUnderstood;

    /// One step a line: `at 5s lose n2`. `cut n1 from others` and `join n1 with
    /// others` stand for all links both ways, `at 9s..12s flap n3 300ms` for
    /// cutting and joining it in turns. `#` begins a comment.
    fn from_str(text: &str) -> Result<Self, NotUnderstood> {
        let mut scenario = Scenario { nodes: 0, memory_mib: 4096, witness: false, steps: Vec::new(), end_ms: 0 };
        for (number, line) in (1..).zip(text.lines()) {
            let words: Vec<_> = line.split('#').next().unwrap_or("").split_whitespace().collect();
            scenario.read(&words).map_err(|why| NotUnderstood { line: number, why })?;
        }
        scenario.steps.sort_by_key(|step| step.at_ms);
        let missing = |why: &str| Err(NotUnderstood { line: 0, why: why.into() });
        if scenario.nodes == 0 {
            return missing("how many `nodes` are there?");
        }
        if scenario.end_ms == 0 {
            return missing("when is the `end`?");
        }
        Ok(scenario)
    }
}

impl Scenario {
    fn read(&mut self, words: &[&str]) -> Result<(), String> {
        match words {
            [] => Ok(()),
            ["nodes", count, rest @ ..] => {
                self.nodes = count.parse().map_err(|_| format!("{count:?} nodes?"))?;
                if let [memory] = rest {
                    self.memory_mib = mebibytes(memory)?;
                }
                Ok(())
            }
            ["witness"] => {
                self.witness = true;
                Ok(())
            }
            ["end", at] => {
                self.end_ms = milliseconds(at)?;
                Ok(())
            }
            ["at", at, deed @ ..] => self.read_deed(at, deed),
            _ => Err(format!("{:?} is neither `nodes`, `at` nor `end`", words.join(" "))),
        }
    }

    fn read_deed(&mut self, at: &str, deed: &[&str]) -> Result<(), String> {
        let (from, until) = match at.split_once("..") {
            Some((from, until)) => (milliseconds(from)?, milliseconds(until)?),
            None => (milliseconds(at)?, 0),
        };
        let mut both_ways = |at_ms: u64, node: usize, cut: bool| {
            for other in (0..self.nodes).filter(|other| *other != node) {
                for (a, b) in [(node, other), (other, node)] {
                    let all = Traffic::All;
                    let fault = if cut { Fault::Cut(a, b, all) } else { Fault::Join(a, b, all) };
                    self.steps.push(Step { at_ms, deed: Deed::Fault(fault) });
                }
            }
        };
        match deed {
            ["cut", n, "from", "others"] => both_ways(from, node(n)?, true),
            ["join", n, "with", "others"] => both_ways(from, node(n)?, false),
            ["flap", n, every] => {
                let (n, every) = (node(n)?, milliseconds(every)?.max(1));
                for (turn, at) in (from..until).step_by(every as usize).enumerate() {
                    both_ways(at, n, turn % 2 == 0);
                }
                both_ways(until, n, false);
            }
            words => self.steps.push(Step { at_ms: from, deed: words.join(" ").parse()? }),
        }
        Ok(())
    }
}

impl FromStr for Deed {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let words: Vec<_> = text.split_whitespace().collect();
        let vm = |name: &&str| (*name).to_owned();
        let number = |word: &str| word.parse::<u64>().map_err(|_| format!("{word:?} is no number"));
        let ask = |wish| Ok(Deed::Ask(wish));
        let fault = |fault| Ok(Deed::Fault(fault));
        match words.as_slice() {
            ["vm", name, memory, priority] => ask(Wish::Create {
                vm: vm(name),
                memory_mib: mebibytes(memory)?,
                priority: match *priority {
                    "none" => Priority::None,
                    "low" => Priority::Low,
                    "medium" => Priority::Medium,
                    "high" => Priority::High,
                    other => return Err(format!("{other:?} is no priority")),
                },
            }),
            ["start", name] => ask(Wish::Start(vm(name))),
            ["stop", name] => ask(Wish::Stop(vm(name))),
            ["force", name] => ask(Wish::Force(vm(name))),
            ["pause", name] => ask(Wish::Pause(vm(name))),
            ["restart", name] => ask(Wish::Restart(vm(name))),
            ["delete", name] => ask(Wish::Delete(vm(name))),
            ["migrate", name] => ask(Wish::Migrate(vm(name), None)),
            ["migrate", name, to] => ask(Wish::Migrate(vm(name), Some(node(to)?))),
            ["cancel", name] => ask(Wish::Cancel(vm(name))),
            ["remove", n] => ask(Wish::Remove(node(n)?)),
            ["drain", n] => ask(Wish::Drain(node(n)?)),
            ["resume", n] => ask(Wish::Resume(node(n)?)),
            ["memory", n, memory] => ask(Wish::Memory(node(n)?, mebibytes(memory)?)),
            ["profile", "default"] => ask(Wish::Profile(Profile::Default)),
            ["profile", "fast"] => ask(Wish::Profile(Profile::Fast)),
            ["profile", "wan"] => ask(Wish::Profile(Profile::Wan)),
            ["own", volume, n] => ask(Wish::Own(lun_of(volume)?, node(n)?)),
            ["cast"] => fault(Fault::Cast),
            ["lose-at-verdict", n] => fault(Fault::LoseAtVerdict(node(n)?)),
            ["lose", n] => fault(Fault::Lose(node(n)?)),
            ["return", n] => fault(Fault::Return(node(n)?)),
            ["cut", from, "to", to, what @ ..] => fault(Fault::Cut(node(from)?, node(to)?, traffic(what)?)),
            ["join", from, "to", to, what @ ..] => fault(Fault::Join(node(from)?, node(to)?, traffic(what)?)),
            ["crash-agent", n] => fault(Fault::CrashAgent(node(n)?)),
            ["restart-agent", n, ms] => fault(Fault::RestartAgent(node(n)?, milliseconds(ms)?)),
            ["crash-keeper", n] => fault(Fault::CrashKeeper(node(n)?)),
            ["freeze-agent", n] => fault(Fault::FreezeAgent(node(n)?)),
            ["thaw-agent", n] => fault(Fault::ThawAgent(node(n)?)),
            ["freeze-keeper", n] => fault(Fault::FreezeKeeper(node(n)?)),
            ["thaw-keeper", n] => fault(Fault::ThawKeeper(node(n)?)),
            ["suspend", n] => fault(Fault::Suspend(node(n)?)),
            ["wake", n] => fault(Fault::Wake(node(n)?)),
            ["crash", name] => fault(Fault::Crash(vm(name))),
            ["shutdown", name] => fault(Fault::Shutdown(vm(name))),
            ["slow-disk", n, ms] => fault(Fault::SlowDisk(node(n)?, milliseconds(ms)?)),
            ["storm", lost, doubled, late] => fault(Fault::Storm(number(lost)?, number(doubled)?, milliseconds(late)?)),
            ["cut-path", n, "to", lun] => fault(Fault::CutPath(node(n)?, lun_of(lun)?)),
            ["join-path", n, "to", lun] => fault(Fault::JoinPath(node(n)?, lun_of(lun)?)),
            ["cut-disk", n] => fault(Fault::CutDisk(node(n)?)),
            ["join-disk", n] => fault(Fault::JoinDisk(node(n)?)),
            ["slow-witness", ms] => fault(Fault::SlowWitness(milliseconds(ms)?)),
            ["copy-disk"] => fault(Fault::CopyDisk),
            ["old-disk"] => fault(Fault::OldDisk),
            ["set-clock", n, ms] => {
                let ms = ms.parse().map_err(|_| format!("{ms:?} is no number of milliseconds"))?;
                fault(Fault::SetClock(node(n)?, ms))
            }
            ["heal"] => fault(Fault::Heal),
            _ => Err(format!("{text:?} is nothing that can happen here")),
        }
    }
}

fn node(word: &str) -> Result<usize, String> {
    role::read(word).ok_or_else(|| format!("{word:?} is no node: the first is n1"))
}

fn lun(number: usize) -> String {
    format!("lun{}", number + 1)
}

fn lun_of(word: &str) -> Result<usize, String> {
    let number = word.strip_prefix("lun").and_then(|number| number.parse::<usize>().ok()?.checked_sub(1));
    number.ok_or_else(|| format!("{word:?} is no LUN: the first is lun1"))
}

fn traffic(words: &[&str]) -> Result<Traffic, String> {
    match words {
        [] => Ok(Traffic::All),
        ["heartbeats"] => Ok(Traffic::Heartbeats),
        ["agents"] => Ok(Traffic::Agents),
        ["migration"] => Ok(Traffic::Migration),
        _ => Err(format!("{:?} is no kind of traffic", words.join(" "))),
    }
}

fn mebibytes(word: &str) -> Result<u64, String> {
    let number = word.strip_suffix('M').and_then(|number| number.parse().ok());
    number.ok_or_else(|| format!("{word:?} is no amount of memory: write 512M"))
}

fn milliseconds(word: &str) -> Result<u64, String> {
    let bad = || format!("{word:?} is no time: write 1500ms or 5s");
    if let Some(ms) = word.strip_suffix("ms") {
        return ms.parse().map_err(|_| bad());
    }
    let seconds: f64 = word.strip_suffix('s').and_then(|s| s.parse().ok()).ok_or_else(bad)?;
    Ok((seconds * 1000.0).round() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_deed_reads_back_as_it_was_written() {
        for text in [
            "vm web 512M high",
            "start web",
            "stop web",
            "force web",
            "pause web",
            "restart web",
            "delete web",
            "migrate web",
            "migrate web n3",
            "cancel web",
            "remove n2",
            "drain n2",
            "resume coordinator",
            "memory n1 64M",
            "profile wan",
            "own lun2 n3",
            "cast",
            "lose n1",
            "lose voter1",
            "lose-at-verdict coordinator",
            "return n1",
            "cut n1 to n2",
            "cut n1 to n2 heartbeats",
            "join n2 to n1 agents",
            "join n2 to n1 migration",
            "crash-agent n1",
            "restart-agent n1 20ms",
            "crash-keeper n1",
            "freeze-agent n1",
            "thaw-agent n1",
            "freeze-keeper n1",
            "thaw-keeper n1",
            "suspend n9",
            "wake n9",
            "crash web",
            "shutdown web",
            "slow-disk n1 250ms",
            "storm 10 20 300ms",
            "cut-path n1 to lun1",
            "join-path coordinator to lun2",
            "cut-disk host",
            "join-disk n2",
            "slow-witness 80ms",
            "copy-disk",
            "old-disk",
            "set-clock n1 -5000",
            "heal",
        ] {
            assert_eq!(text.parse::<Deed>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn a_line_that_is_not_understood_is_named() {
        let told = |text: &str| text.parse::<Scenario>().unwrap_err().to_string();
        assert_eq!(told("nodes 3\n\nat 5s lsoe n2"), "line 3: \"lsoe n2\" is nothing that can happen here");
        assert_eq!(told("nodes 3\nat 5 lose n2"), "line 2: \"5\" is no time: write 1500ms or 5s");
        assert_eq!(told("nodes 3\nat 5s lose n0"), "line 2: \"n0\" is no node: the first is n1");
        assert_eq!(told("nodes 3"), "line 0: when is the `end`?");
    }
}
