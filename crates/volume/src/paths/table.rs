//! Which way an attempt goes, decided without doing anything.
//!
//! ```text
//!            an error, or silence            the probe fails, or is not answered
//!   works ───────────────────────▶ doubted ─────────────────────────────────────▶ lost
//!     ▲                               │                                            │
//!     └──────── a probe works ────────┴────────────────────────────────────────────┘
//! ```
//! Two rules keep the order of writes: a write is said to be over only when nothing of it
//! can happen any more, and none begins on one way while one to the same bytes is under
//! way on the other.

use std::time::{Duration, Instant};

use slab::Slab;

use crate::piece::Op;

/// An attempt that has no end after so long makes its way doubtful.
const SILENT_AFTER: Duration = Duration::from_secs(1);
/// A probe that has no answer after so long has failed.
const PROBE_WITHIN: Duration = Duration::from_millis(500);
/// How often a lost way is probed.
const PROBE_DIRECT_AGAIN: Duration = Duration::from_secs(1);
const PROBE_LINK_AGAIN: Duration = Duration::from_millis(200);
/// A request that fails so often while its way was seen to work fails for itself.
const FAILURES: u8 = 3;

/// A way to the bytes of a LUN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// This host's own.
    Direct,
    /// Through another node.
    Link,
}

/// How it stands with a way.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Health {
    Works,
    /// It failed just now; a probe will tell.
    Failed(String),
    /// It has been silent; a probe will tell, and until then it is used.
    Silent,
    Lost(String),
    /// Nobody knows yet.
    Untried,
    /// There is none.
    None,
}

#[derive(Debug)]
struct State {
    health: Health,
    /// How often it was lost.
    losses: u64,
    /// Since when a probe is under way.
    probe: Option<Instant>,
    /// Not to be probed before.
    probe_at: Instant,
    /// Attempts under way.
    count: usize,
}

#[derive(Debug)]
struct Attempt {
    way: Way,
    writes: bool,
    at: u64,
    end: u64,
    since: Instant,
}

/// What a request has had of failures so far.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Luck {
    /// Failures for which its way was not to blame.
    failures: u8,
    /// It has failed on the direct way, which had been lost so often.
    doubt: Option<u64>,
}

/// Whether and where an attempt may begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Begin {
    /// There, under this number, until it is said to be over.
    Go(Way, usize),
    /// Not now.
    Wait,
    /// Never: nothing is wrong with the way, and it failed again and again.
    Refuse,
    /// Not by this node.
    NoPath,
}

/// How an attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End<'a> {
    /// As the storage says, well or not.
    Told,
    /// The way failed, and nothing of the attempt can happen any more.
    WayFailed(&'a str),
    /// The other node did not do it: it came too late.
    Late,
}

/// How a node reaches a LUN.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reach {
    /// By itself.
    Direct,
    /// Through another node.
    Redirected {
        /// Why not by itself.
        why: String,
    },
    /// Not at all: requests wait.
    Unavailable {
        /// Why.
        why: String,
    },
}

/// The attempts on one LUN and the ways that they can take.
#[derive(Debug)]
pub(crate) struct Table {
    direct: State,
    link: State,
    /// The link is to be used even if the direct way works.
    planned: bool,
    /// The direct way is not used until the link has answered once: what an earlier life
    /// of this process had sent over it may be under way.
    held: bool,
    attempts: Slab<Attempt>,
    reach: Reach,
}

impl State {
    fn new(health: Health, now: Instant) -> State {
        State { health, losses: 0, probe: None, probe_at: now, count: 0 }
    }

    fn lose(&mut self, why: &str, now: Instant, again: Duration) {
        if !matches!(self.health, Health::Lost(_)) {
            self.losses += 1;
        }
        self.health = Health::Lost(why.into());
        self.probe_at = now + again;
    }

    fn why(&self) -> &str {
        match &self.health {
            Health::Failed(why) | Health::Lost(why) => why,
            _ => "",
        }
    }
}

impl Table {
    /// With a direct way that was just seen to work, or why there is none.
    pub(crate) fn new(direct: Result<(), String>, now: Instant) -> Table {
        let (health, reach) = match direct {
            Ok(()) => (Health::Works, Reach::Direct),
            Err(why) => (Health::Lost(why.clone()), Reach::Unavailable { why }),
        };
        let (direct, link) = (State::new(health, now), State::new(Health::None, now));
        Table { direct, link, planned: false, held: false, attempts: Slab::new(), reach }
    }

    /// There is another node to go through, a new one, or none.
    pub(crate) fn set_link(&mut self, exists: bool, now: Instant) {
        self.link.health = if exists { Health::Untried } else { Health::None };
        (self.link.probe, self.link.probe_at) = (None, now);
    }

    pub(crate) fn set_planned(&mut self, planned: bool) {
        self.planned = planned;
    }

    pub(crate) fn set_held(&mut self, held: bool) {
        self.held = held;
    }

    pub(crate) fn is_held(&self) -> bool {
        self.held
    }

    /// Whether attempts are under way.
    pub(crate) fn is_busy(&self) -> bool {
        !self.attempts.is_empty()
    }

    /// Whether nothing is under way on the direct way.
    pub(crate) fn direct_is_idle(&self) -> bool {
        self.direct.count == 0
    }

    fn state(&mut self, way: Way) -> &mut State {
        match way {
            Way::Direct => &mut self.direct,
            Way::Link => &mut self.link,
        }
    }

    fn way(&self) -> Option<Way> {
        let direct = matches!(self.direct.health, Health::Works | Health::Silent) && !self.held;
        let link = self.link.health == Health::Works;
        match (direct, link) {
            (true, true) if self.planned => Some(Way::Link),
            (true, _) => Some(Way::Direct),
            (false, true) => Some(Way::Link),
            (false, false) => None,
        }
    }

    /// Whether the link is needed, now or soon.
    fn wants_link(&self) -> bool {
        self.planned || self.held || self.direct.health != Health::Works
    }

    /// An attempt wants to begin; `alone`: no other node may do it for this one.
    pub(crate) fn begin(
        &mut self,
        op: Op,
        (at, length): (u64, u64),
        alone: bool,
        luck: &mut Luck,
        now: Instant,
    ) -> Begin {
        if let (Some(losses), Health::Works) = (luck.doubt, &self.direct.health) {
            luck.doubt = None;
            luck.failures += u8::from(losses == self.direct.losses);
            if luck.failures >= FAILURES {
                return Begin::Refuse;
            }
        }
        let way = match (self.way(), alone, &self.direct.health) {
            (_, true, Health::Lost(_)) => return Begin::NoPath,
            (_, true, Health::Works | Health::Silent) => Way::Direct,
            (Some(way), false, _) => way,
            _ => return Begin::Wait,
        };
        let writes = matches!(op, Op::Write { .. } | Op::Trim | Op::Zero { .. });
        let end = at + length;
        let others = match way {
            Way::Direct => self.link.count,
            Way::Link => self.direct.count,
        };
        let overtakes =
            |(_, other): (usize, &Attempt)| other.way != way && other.writes && at < other.end && other.at < end;
        if writes && others > 0 && self.attempts.iter().any(overtakes) {
            return Begin::Wait;
        }
        self.state(way).count += 1;
        Begin::Go(way, self.attempts.insert(Attempt { way, writes, at, end, since: now }))
    }

    /// The way of an attempt that is under way.
    pub(crate) fn way_of(&self, number: usize) -> Way {
        self.attempts[number].way
    }

    /// An attempt is over; says whether it is to be made again.
    pub(crate) fn over(&mut self, number: usize, end: End<'_>, luck: &mut Luck, now: Instant) -> bool {
        let attempt = self.attempts.remove(number);
        let state = self.state(attempt.way);
        state.count -= 1;
        match (end, attempt.way) {
            (End::Told, _) => return false,
            (End::Late, _) => {}
            (End::WayFailed(why), way) => {
                if matches!(state.health, Health::Works | Health::Silent) {
                    state.health = Health::Failed(why.into());
                    state.probe_at = now;
                }
                if way == Way::Direct && matches!(state.health, Health::Failed(_)) {
                    luck.doubt = Some(state.losses);
                }
            }
        }
        true
    }

    /// What a probe found.
    pub(crate) fn probed(&mut self, way: Way, found: Result<(), String>, now: Instant) {
        let again = if way == Way::Direct { PROBE_DIRECT_AGAIN } else { PROBE_LINK_AGAIN };
        let state = self.state(way);
        state.probe = None;
        match (found, &state.health) {
            (_, Health::None) => {}
            (Ok(()), _) => {
                state.health = Health::Works;
                // One that is slow and not lost is not asked all the time.
                state.probe_at = now + SILENT_AFTER;
                if way == Way::Link {
                    self.held = false;
                }
            }
            (Err(why), _) => state.lose(&why, now, again),
        }
    }

    /// Time has passed: says which ways are to be probed.
    pub(crate) fn tick(&mut self, now: Instant) -> Vec<Way> {
        let silent = |(_, attempt): (usize, &Attempt)| {
            attempt.way == Way::Direct && now.duration_since(attempt.since) >= SILENT_AFTER
        };
        if self.direct.health == Health::Works && now >= self.direct.probe_at && self.attempts.iter().any(silent) {
            self.direct.health = Health::Silent;
        }
        let wants_link = self.wants_link();
        let mut probes = Vec::new();
        for way in [Way::Direct, Way::Link] {
            let wanted = way == Way::Direct || wants_link;
            let state = self.state(way);
            let late = state.probe.is_some_and(|since| now.duration_since(since) >= PROBE_WITHIN);
            if late && !matches!(state.health, Health::None | Health::Lost(_)) {
                state.lose("no answer", now, PROBE_DIRECT_AGAIN);
            }
            let unsure = !matches!(state.health, Health::Works | Health::None);
            if wanted && unsure && state.probe.is_none() && now >= state.probe_at {
                state.probe = Some(now);
                probes.push(way);
            }
        }
        self.conclude();
        probes
    }

    /// When time has to be told of again; `None`: not before something happens.
    pub(crate) fn wakes_in(&self, now: Instant) -> Option<Duration> {
        let wants_link = self.wants_link();
        let of = |state: &State, wanted: bool| match (&state.health, state.probe) {
            (Health::Works | Health::None, _) => None,
            (Health::Lost(_), Some(_)) => None,
            (_, Some(since)) => Some((since + PROBE_WITHIN).saturating_duration_since(now)),
            (_, None) => wanted.then(|| state.probe_at.saturating_duration_since(now)),
        };
        let watched = self.is_busy().then_some(PROBE_WITHIN / 2);
        [of(&self.direct, true), of(&self.link, wants_link), watched].into_iter().flatten().min()
    }

    fn conclude(&mut self) {
        let direct = &self.direct;
        self.reach = match self.way() {
            Some(Way::Direct) => Reach::Direct,
            Some(Way::Link) if matches!(direct.health, Health::Works | Health::Silent) => {
                Reach::Redirected { why: "planned".into() }
            }
            Some(Way::Link) => Reach::Redirected { why: direct.why().into() },
            // A probe will tell in a moment.
            None if !matches!(direct.health, Health::Lost(_)) && !self.held => return,
            None if matches!(self.link.health, Health::Untried | Health::Failed(_)) => return,
            None => {
                let direct = match &direct.health {
                    Health::Lost(why) => why,
                    _ => "what was sent through the owner may still be under way",
                };
                let why = match &self.link.health {
                    Health::Lost(why) => format!("{direct}; through the owner: {why}"),
                    _ => direct.to_owned(),
                };
                Reach::Unavailable { why }
            }
        };
    }

    /// How the LUN is reached, once that is settled.
    pub(crate) fn reach(&self) -> &Reach {
        &self.reach
    }

    /// Whether the direct way was given up because it does not answer.
    pub(crate) fn direct_hangs(&self) -> bool {
        self.direct.probe.is_some() && matches!(self.direct.health, Health::Lost(_))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const WRITE: Op = Op::Write { durable: false };

    fn go(table: &mut Table, op: Op, range: (u64, u64), now: Instant) -> (Way, usize) {
        match table.begin(op, range, false, &mut Luck::default(), now) {
            Begin::Go(way, number) => (way, number),
            other => panic!("{other:?}"),
        }
    }

    fn lost(now: Instant) -> Table {
        let mut table = Table::new(Ok(()), now);
        table.set_link(true, now);
        let (_, number) = go(&mut table, Op::Read, (0, 1), now);
        assert!(table.over(number, End::WayFailed("gone"), &mut Luck::default(), now));
        assert_eq!(table.tick(now), [Way::Direct, Way::Link]);
        table.probed(Way::Link, Ok(()), now);
        table.probed(Way::Direct, Err("gone".into()), now);
        table
    }

    #[test]
    fn a_probe_decides_after_a_failure() {
        let now = Instant::now();
        let mut table = lost(now);
        assert_eq!(table.tick(now), []);
        assert_eq!(*table.reach(), Reach::Redirected { why: "gone".into() });
        let (way, number) = go(&mut table, WRITE, (0, 10), now);
        assert_eq!(way, Way::Link);
        assert_eq!(table.tick(now + PROBE_DIRECT_AGAIN), [Way::Direct]);
        table.probed(Way::Direct, Ok(()), now);
        // What is under way on the link is not overtaken.
        let mut luck = Luck::default();
        assert_eq!(table.begin(WRITE, (5, 10), false, &mut luck, now), Begin::Wait);
        assert_eq!(go(&mut table, WRITE, (10, 10), now).0, Way::Direct);
        assert_eq!(go(&mut table, Op::Read, (5, 10), now).0, Way::Direct);
        assert!(!table.over(number, End::Told, &mut luck, now));
        assert_eq!(go(&mut table, WRITE, (5, 10), now).0, Way::Direct);
    }

    #[test]
    fn silence_is_looked_into_and_does_not_stop_others() {
        let now = Instant::now();
        let mut table = Table::new(Ok(()), now);
        let (_, slow) = go(&mut table, WRITE, (0, 10), now);
        assert_eq!(table.tick(now + SILENT_AFTER), [Way::Direct]);
        assert_eq!(go(&mut table, WRITE, (20, 10), now).0, Way::Direct);
        table.probed(Way::Direct, Ok(()), now + SILENT_AFTER);
        assert_eq!(table.tick(now + SILENT_AFTER), []);
        assert_eq!(table.tick(now + 2 * SILENT_AFTER), [Way::Direct]);
        let late = now + 2 * SILENT_AFTER + PROBE_WITHIN;
        table.tick(late);
        assert!(table.direct_hangs() && matches!(table.reach(), Reach::Unavailable { .. }));
        assert_eq!(table.begin(WRITE, (20, 10), false, &mut Luck::default(), late), Begin::Wait);
        assert!(table.over(slow, End::WayFailed("given up"), &mut Luck::default(), late));
    }

    #[test]
    fn who_serves_others_goes_no_further_than_itself() {
        let now = Instant::now();
        let mut table = lost(now);
        let mut luck = Luck::default();
        assert_eq!(table.begin(WRITE, (0, 1), true, &mut luck, now), Begin::NoPath);
        table.probed(Way::Direct, Ok(()), now);
        table.set_planned(true);
        assert!(matches!(table.begin(WRITE, (0, 1), true, &mut luck, now), Begin::Go(Way::Direct, _)));
        assert!(matches!(table.begin(WRITE, (4, 1), false, &mut luck, now), Begin::Go(Way::Link, _)));
    }

    #[test]
    fn nothing_goes_direct_before_what_an_earlier_life_sent_is_over() {
        let now = Instant::now();
        let mut table = Table::new(Ok(()), now);
        table.set_held(true);
        table.set_link(true, now);
        assert_eq!(table.begin(WRITE, (0, 1), false, &mut Luck::default(), now), Begin::Wait);
        assert_eq!(table.tick(now), [Way::Link]);
        table.probed(Way::Link, Err("nobody".into()), now);
        assert_eq!(table.begin(WRITE, (0, 1), false, &mut Luck::default(), now), Begin::Wait);
        table.probed(Way::Link, Ok(()), now);
        assert_eq!(go(&mut table, WRITE, (0, 1), now).0, Way::Direct);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Begin(bool, u64, u64),
        Over(usize, u8),
        Probed(bool, bool),
        Pass(u64),
        Link(bool),
        Plan(bool),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            8 => (any::<bool>(), 0..20_u64, 1..6_u64).prop_map(|(write, at, length)| Step::Begin(write, at, length)),
            6 => (0..8_usize, 0..6_u8).prop_map(|(which, how)| Step::Over(which, how)),
            4 => (any::<bool>(), any::<bool>()).prop_map(|(direct, works)| Step::Probed(direct, works)),
            4 => (0..1500_u64).prop_map(Step::Pass),
            1 => any::<bool>().prop_map(Step::Link),
            1 => any::<bool>().prop_map(Step::Plan),
        ]
    }

    proptest! {
        /// Whatever fails whenever: no write is under way on one way while one to the same
        /// bytes is on the other, and when everything works again, nothing waits for ever.
        #[test]
        fn no_write_is_overtaken_on_the_other_way(steps in proptest::collection::vec(step(), 0..300)) {
            let mut now = Instant::now();
            let mut table = Table::new(Ok(()), now);
            let mut under_way: Vec<(usize, Way, bool, u64, u64)> = Vec::new();
            for step in steps {
                match step {
                    Step::Begin(write, at, length) => {
                        let op = if write { WRITE } else { Op::Read };
                        let began = table.begin(op, (at, length), false, &mut Luck::default(), now);
                        if let Begin::Go(way, number) = began {
                            let overtakes = under_way.iter().any(|(_, other, writes, from, end)| {
                                write && *writes && *other != way && at < *end && *from < at + length
                            });
                            prop_assert!(!overtakes);
                            under_way.push((number, way, write, at, at + length));
                        }
                    }
                    Step::Over(which, how) if which < under_way.len() => {
                        let (number, ..) = under_way.swap_remove(which);
                        let end = match how {
                            0 => End::WayFailed("gone"),
                            1 => End::Late,
                            _ => End::Told,
                        };
                        prop_assert_eq!(table.over(number, end, &mut Luck::default(), now), how < 2);
                    }
                    Step::Over(..) => {}
                    Step::Probed(direct, works) => {
                        let way = if direct { Way::Direct } else { Way::Link };
                        table.probed(way, if works { Ok(()) } else { Err("gone".into()) }, now);
                    }
                    Step::Pass(milliseconds) => {
                        now += Duration::from_millis(milliseconds);
                        table.tick(now);
                    }
                    Step::Link(exists) => table.set_link(exists, now),
                    Step::Plan(planned) => table.set_planned(planned),
                }
            }
            for (number, ..) in under_way {
                table.over(number, End::Told, &mut Luck::default(), now);
            }
            table.set_planned(false);
            table.probed(Way::Direct, Ok(()), now);
            table.tick(now);
            prop_assert_eq!(table.reach(), &Reach::Direct);
            prop_assert_eq!(go(&mut table, WRITE, (0, 100), now).0, Way::Direct);
        }
    }
}
