//! Who takes part in consensus, and what makes a majority of them.

use std::fmt;

/// Participants, a bit each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Group(u128);

impl Group {
    /// Whether this one belongs to it.
    pub fn contains(self, who: usize) -> bool {
        self.0 >> who & 1 == 1
    }

    /// Takes one in.
    pub fn insert(&mut self, who: usize) {
        self.0 |= 1 << who;
    }

    /// Those of either.
    pub fn or(self, other: Group) -> Group {
        Group(self.0 | other.0)
    }

    /// Those that do not belong to the other.
    pub fn without(self, other: Group) -> Group {
        Group(self.0 & !other.0)
    }

    /// How many there are.
    pub fn len(self) -> usize {
        self.0.count_ones() as usize
    }

    /// Whether there is nobody.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Each of them, from the lowest number.
    pub fn iter(self) -> impl Iterator<Item = usize> {
        let mut left = self.0;
        std::iter::from_fn(move || {
            let lowest = (left != 0).then(|| left.trailing_zeros() as usize)?;
            left &= left - 1;
            Some(lowest)
        })
    }

    /// Whether more than half of this group are in `others`.
    pub fn has_majority_in(self, others: Group) -> bool {
        2 * Group(self.0 & others.0).len() > self.len()
    }

    /// The highest value that more than half of them have reached.
    fn reached<T: Copy + Ord>(self, of: impl Fn(usize) -> T) -> Option<T> {
        let mut values: Vec<T> = self.iter().map(of).collect();
        values.sort_unstable_by(|a, b| b.cmp(a));
        values.get(self.len() / 2).copied()
    }
}

impl FromIterator<usize> for Group {
    fn from_iter<I: IntoIterator<Item = usize>>(all: I) -> Self {
        let mut group = Group::default();
        all.into_iter().for_each(|who| group.insert(who));
        group
    }
}

impl fmt::Display for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.iter().map(|who| format!("n{}", who + 1)).collect();
        f.write_str(&names.join(" "))
    }
}

/// What an entry of the log says about who takes part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Members {
    /// They vote.
    pub voters: Group,
    /// While voters change: those of before, whose majority is needed as well.
    pub before: Option<Group>,
    /// They only receive the log.
    pub learners: Group,
}

impl Members {
    /// Everybody who votes now, of before and of after.
    pub fn voting(&self) -> Group {
        self.voters.or(self.before.unwrap_or_default())
    }

    /// Everybody.
    pub fn all(&self) -> Group {
        self.voting().or(self.learners)
    }

    /// Whether these can decide.
    pub fn agree(&self, these: Group) -> bool {
        self.voters.has_majority_in(these) && self.before.is_none_or(|before| before.has_majority_in(these))
    }

    /// The highest value that a majority, or both of them, has reached.
    pub fn reached<T: Copy + Ord>(&self, of: impl Fn(usize) -> T) -> Option<T> {
        let new = self.voters.reached(&of)?;
        match self.before {
            None => Some(new),
            Some(before) => before.reached(of).map(|old| old.min(new)),
        }
    }

    /// The only one who votes, if there is one.
    pub fn sole(&self) -> Option<usize> {
        let mut voting = self.voting().iter();
        voting.next().filter(|_| voting.next().is_none())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(of: &[usize]) -> Group {
        of.iter().copied().collect()
    }

    #[test]
    fn while_voters_change_both_majorities_count() {
        let acked = [9, 7, 5, 3, 1];
        let of = |who: usize| acked[who];
        let three = Members { voters: group(&[0, 1, 2]), before: None, learners: group(&[3, 4]) };
        assert_eq!(three.reached(of), Some(7));
        let joint = Members { voters: group(&[0, 3, 4]), before: Some(three.voters), learners: Group::default() };
        assert_eq!(joint.reached(of), Some(3));
        assert!(!joint.agree(group(&[0, 1])) && joint.agree(group(&[0, 1, 4])));
        assert_eq!(joint.sole(), None);
    }

    #[test]
    fn an_even_number_needs_more_than_half() {
        let two = Members { voters: group(&[0, 1]), before: None, learners: Group::default() };
        assert!(!two.agree(group(&[1])) && two.agree(group(&[0, 1])));
        assert_eq!(two.reached(|who| who), Some(0));
        let one = Members { voters: group(&[1]), before: None, learners: group(&[0]) };
        assert_eq!((one.sole(), one.all().len()), (Some(1), 2));
    }
}
