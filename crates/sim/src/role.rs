//! Roles: a script may mean a node by what it does when its moment has come, as an
//! adversary would, instead of by its number.

use crate::script::Fault;

/// From here on a node's number is a role: the place in [`NAMES`] beyond this.
const FIRST: usize = 1_000;

/// Coordinates.
pub const COORDINATOR: usize = FIRST;
/// The first other node that votes, or listens where no other votes.
pub const VOTER1: usize = FIRST + 1;
/// The second.
pub const VOTER2: usize = FIRST + 2;
/// Hosts the witness.
pub const HOST: usize = FIRST + 3;

/// How they are written.
const NAMES: [&str; 4] = ["coordinator", "voter1", "voter2", "host"];

/// Who plays each role.
pub type Cast = [Option<usize>; NAMES.len()];

/// A node as it is written: `n1` is the first.
pub fn written(node: usize) -> String {
    let role = node.checked_sub(FIRST).and_then(|role| NAMES.get(role));
    role.map_or_else(|| format!("n{}", node + 1), |role| (*role).to_owned())
}

/// A node from how it is written.
pub fn read(word: &str) -> Option<usize> {
    if let Some(role) = NAMES.iter().position(|name| *name == word) {
        return Some(FIRST + role);
    }
    word.strip_prefix('n')?.parse::<usize>().ok()?.checked_sub(1).filter(|node| *node < FIRST)
}

/// The node that is meant; `None` for a role that nobody plays.
pub fn player(cast: &Cast, node: usize) -> Option<usize> {
    match node.checked_sub(FIRST) {
        None => Some(node),
        Some(role) => cast.get(role).copied().flatten(),
    }
}

impl Fault {
    /// The same, of those who play the roles in it; `None` if nobody plays one.
    pub fn played_by(mut self, cast: &Cast) -> Option<Fault> {
        for node in self.nodes() {
            *node = player(cast, *node)?;
        }
        Some(self)
    }

    fn nodes(&mut self) -> Vec<&mut usize> {
        match self {
            Fault::Cut(from, to, _) | Fault::Join(from, to, _) => vec![from, to],
            Fault::Lose(node)
            | Fault::LoseAtVerdict(node)
            | Fault::Return(node)
            | Fault::CrashAgent(node)
            | Fault::RestartAgent(node, _)
            | Fault::CrashKeeper(node)
            | Fault::FreezeAgent(node)
            | Fault::ThawAgent(node)
            | Fault::FreezeKeeper(node)
            | Fault::ThawKeeper(node)
            | Fault::Suspend(node)
            | Fault::Wake(node)
            | Fault::SlowDisk(node, _)
            | Fault::CutPath(node, _)
            | Fault::JoinPath(node, _)
            | Fault::CutDisk(node)
            | Fault::JoinDisk(node)
            | Fault::SetClock(node, _) => vec![node],
            Fault::Cast
            | Fault::Crash(_)
            | Fault::Shutdown(_)
            | Fault::Storm(..)
            | Fault::SlowWitness(_)
            | Fault::CopyDisk
            | Fault::OldDisk
            | Fault::Heal => Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::script::Traffic;

    #[test]
    fn a_role_reads_back_as_it_was_written() {
        for word in ["n1", "n64", "coordinator", "voter1", "voter2", "host"] {
            assert_eq!(read(word).map(written).as_deref(), Some(word));
        }
        assert_eq!((read("n0"), read("n1001"), read("voter3"), read("")), (None, None, None, None));
    }

    #[test]
    fn a_fault_strikes_those_who_play_the_roles() {
        let cast = [Some(2), Some(0), None, None];
        let cut = Fault::Cut(COORDINATOR, VOTER1, Traffic::All);
        assert_eq!(cut.played_by(&cast), Some(Fault::Cut(2, 0, Traffic::All)));
        assert_eq!(Fault::Lose(VOTER2).played_by(&cast), None);
        assert_eq!(Fault::Lose(7).played_by(&cast), Some(Fault::Lose(7)));
        assert_eq!(Fault::Heal.played_by(&cast), Some(Fault::Heal));
    }
}
