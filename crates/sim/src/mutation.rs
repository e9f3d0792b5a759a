//! Deliberate weakenings of a safety rule: each has to be caught by some seed, or
//! the simulation does not see what it claims to see.

use std::fmt;

/// One weakening. It lives in the world around the decisions, never in them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mutation {
    /// The coordinator calls a lease ended when its length is over, without margin.
    DropMargin,
    /// A lease counts from when its grant came in, not from when it was asked for.
    LeaseFromReceipt,
    /// A new coordinator does not wait for the leases of its predecessor.
    SkipWait,
    /// The keeper starts an epoch that was used already.
    IgnoreEpoch,
    /// The keeper starts what was permitted in another term of its node.
    IgnoreTerm,
    /// A node that was silent for three heartbeats counts as lost.
    SilenceIsLost,
    /// A proposal that timed out counts as failed, and so does what follows from it.
    TimeoutIsFailure,
    /// The target of a migration continues the guest without the source's word.
    ContinueWithoutWord,
    /// The target of a migration continues the guest when the source is lost.
    ContinueForTheLost,
    /// The coordinator grants leases whether a quorum has acknowledged it or not.
    GrantWithoutAuthority,
    /// A voter elects another coordinator right after it accepted one's message.
    VoteAtOnce,
    /// Heartbeats of an earlier life of a keeper count: no challenge.
    HearEarlierLives,
    /// The keeper lets VMs run on when its lease ends.
    OutliveTheLease,
    /// A fence that failed, hung or could not tell counts as a power cut.
    BelieveFailedFence,
    /// A voter that comes back does not hold still first.
    ForgetHold,
    /// A follower acknowledges entries before they are on its disk.
    AcknowledgeBeforeTheDisk,
    /// Voters change in one step: the old majority is not asked.
    SkipJoint,
    /// A node whose agent has acknowledged nothing for as long as a lease counts as
    /// lost, whatever its keeper asked for.
    UnheardIsLost,
    /// A new coordinator begins before the first entry of its term is agreed on, and
    /// with it all that was agreed on before.
    CoordinateAtOnce,
    /// A disk that shows less of the witness than was seen before counts.
    StaleWitnessVotes,
    /// The witness answers although its lease on the disk has ended meanwhile.
    AnswerWithoutLease,
    /// Whoever claimed the witness's disk trusts what it saw before, and does not look again.
    ClaimWithoutLooking,
    /// An owner says that it has left a volume while I/O for others is under way.
    LeaveEarly,
    /// A node that is removed is none any more at once, whatever its lease.
    ForgetAtOnce,
}

impl Mutation {
    /// All of them.
    pub const ALL: [Mutation; 24] = [
        Mutation::DropMargin,
        Mutation::LeaseFromReceipt,
        Mutation::SkipWait,
        Mutation::IgnoreEpoch,
        Mutation::IgnoreTerm,
        Mutation::SilenceIsLost,
        Mutation::TimeoutIsFailure,
        Mutation::ContinueWithoutWord,
        Mutation::ContinueForTheLost,
        Mutation::GrantWithoutAuthority,
        Mutation::VoteAtOnce,
        Mutation::HearEarlierLives,
        Mutation::OutliveTheLease,
        Mutation::BelieveFailedFence,
        Mutation::ForgetHold,
        Mutation::AcknowledgeBeforeTheDisk,
        Mutation::SkipJoint,
        Mutation::UnheardIsLost,
        Mutation::CoordinateAtOnce,
        Mutation::StaleWitnessVotes,
        Mutation::AnswerWithoutLease,
        Mutation::ClaimWithoutLooking,
        Mutation::LeaveEarly,
        Mutation::ForgetAtOnce,
    ];
}

impl fmt::Display for Mutation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Mutation::DropMargin => "drop the margin",
            Mutation::LeaseFromReceipt => "count the lease from receipt",
            Mutation::SkipWait => "skip the new coordinator's wait",
            Mutation::IgnoreEpoch => "ignore the epoch in the keeper",
            Mutation::IgnoreTerm => "ignore the term in the keeper",
            Mutation::SilenceIsLost => "restart before fencing",
            Mutation::TimeoutIsFailure => "trust a timed-out proposal as failed",
            Mutation::ContinueWithoutWord => "continue the target without the source's word",
            Mutation::ContinueForTheLost => "continue the target when the source is lost",
            Mutation::GrantWithoutAuthority => "grant without authority",
            Mutation::VoteAtOnce => "vote without holding still",
            Mutation::HearEarlierLives => "hear earlier lives of a keeper",
            Mutation::OutliveTheLease => "let VMs outlive the lease",
            Mutation::BelieveFailedFence => "believe a fence that failed",
            Mutation::ForgetHold => "forget the hold of a restarted voter",
            Mutation::AcknowledgeBeforeTheDisk => "acknowledge before the disk",
            Mutation::SkipJoint => "change voters without the old majority",
            Mutation::CoordinateAtOnce => "coordinate before the first entry is agreed on",
            Mutation::StaleWitnessVotes => "let a stale witness vote",
            Mutation::AnswerWithoutLease => "let the witness answer without its lease",
            Mutation::ClaimWithoutLooking => "claim the witness without looking again",
            Mutation::LeaveEarly => "leave a volume while I/O is under way",
            Mutation::ForgetAtOnce => "forget a removed node before its lease ends",
            Mutation::UnheardIsLost => "declare lost on silence of acknowledgements",
        })
    }
}
