use proptest::prelude::*;

use super::*;

const LEASE_MS: u64 = 1_500;

fn at(ms: u64) -> BootTime {
    BootTime(0).plus_ms(ms)
}

/// A lease that ends at `ends_ms` and is over from then on.
fn seen(now_ms: u64, ends_ms: u64, alive: bool) -> Seen {
    Seen { held: now_ms < ends_ms, ends: at(ends_ms), alive, lease_ms: LEASE_MS }
}

fn armed() -> Watchdog {
    let mut watchdog = Watchdog::default();
    assert_eq!(watchdog.turn(at(0), seen(0, 1_500, true)), Act::Arm(10));
    watchdog.armed(10);
    watchdog
}

#[test]
fn it_is_armed_only_while_a_vm_is_alive() {
    let mut watchdog = Watchdog::default();
    assert_eq!(watchdog.turn(at(0), seen(0, 1_500, false)), Act::Rest);
    assert_eq!(watchdog.wake(at(0), seen(0, 1_500, false)), None);
    let mut watchdog = armed();
    assert_eq!(watchdog.turn(at(500), seen(500, 2_000, true)), Act::Feed);
    assert_eq!(watchdog.wake(at(500), seen(500, 2_000, true)), Some(at(1_500)));
    assert_eq!(watchdog.turn(at(900), seen(900, 2_400, false)), Act::Disarm);
    assert_eq!(watchdog.turn(at(901), seen(901, 2_400, false)), Act::Disarm, "until it was done");
    watchdog.disarmed();
    assert_eq!(watchdog.turn(at(902), seen(902, 2_400, false)), Act::Rest);
}

#[test]
fn a_lost_lease_alone_never_leaves_it() {
    let mut watchdog = armed();
    assert_eq!(watchdog.turn(at(6_499), seen(6_499, 1_500, true)), Act::Feed);
    assert_eq!(watchdog.turn(at(6_500), seen(6_500, 1_500, false)), Act::Disarm, "dead in time");
}

#[test]
fn a_vm_that_does_not_die_leaves_it_once_and_only_deaths_take_that_back() {
    let mut watchdog = armed();
    assert_eq!(watchdog.turn(at(6_500), seen(6_500, 1_500, true)), Act::Leave);
    assert_eq!(watchdog.turn(at(7_500), seen(7_500, 1_500, true)), Act::Rest);
    // Granted again: not used while the VM lives, so it is not held.
    let again = Seen { held: false, ends: at(1_500), ..seen(8_000, 9_500, true) };
    assert_eq!(watchdog.turn(at(8_000), again), Act::Rest);
    let mut other = watchdog;
    assert_eq!(watchdog.turn(at(9_000), seen(9_000, 1_500, false)), Act::Disarm);
    // All died between two looks, and others run under the next lease.
    assert_eq!(other.turn(at(9_000), seen(9_000, 10_500, true)), Act::Feed);
}

#[test]
fn what_could_not_be_armed_is_tried_again_but_not_when_it_is_too_late() {
    let mut watchdog = Watchdog::default();
    assert_eq!(watchdog.turn(at(0), seen(0, 1_500, true)), Act::Arm(10));
    watchdog.failed(at(0));
    let lasting = |now| seen(now, now + LEASE_MS, true);
    assert_eq!(watchdog.turn(at(1_000), lasting(1_000)), Act::Rest);
    assert_eq!(watchdog.wake(at(1_000), lasting(1_000)), Some(at(RETRY_MS)));
    let mut late = watchdog;
    assert_eq!(watchdog.turn(at(RETRY_MS), lasting(RETRY_MS)), Act::Arm(10));
    assert_eq!(late.turn(at(RETRY_MS), seen(RETRY_MS, RETRY_MS - DEATH_MS, true)), Act::Rest);
}

#[test]
fn its_time_follows_the_leases() {
    assert_eq!((timeout_s(600), timeout_s(1_500), timeout_s(10_000)), (10, 10, 15));
    let mut watchdog = armed();
    let longer = Seen { lease_ms: 10_000, ..seen(1_000, 11_000, true) };
    assert_eq!(watchdog.turn(at(1_000), longer), Act::Retime(15));
    watchdog.armed(15);
    assert_eq!(watchdog.turn(at(2_000), longer), Act::Feed);
    assert_eq!(watchdog.turn(at(3_000), seen(3_000, 4_500, true)), Act::Retime(10));
}

/// What happens to a keeper, and for how long until it looks at its watchdog next.
#[derive(Clone, Copy, Debug)]
enum Happens {
    /// A VM starts, if VMs may run.
    Start,
    /// All VMs are shown dead.
    Die,
    /// The lease is renewed, or gained when every VM is dead.
    Grant,
    /// The table is closed before the lease's end, as for a new term.
    Close,
    Nothing,
}

fn happens() -> impl Strategy<Value = (Happens, u64)> {
    let what = prop_oneof![
        1 => Just(Happens::Start),
        1 => Just(Happens::Die),
        4 => Just(Happens::Grant),
        1 => Just(Happens::Close),
        2 => Just(Happens::Nothing)
    ];
    (what, 0..=FEED_MS)
}

proptest! {
    /// A keeper and a device, attacked: the device bites only when a VM was not shown
    /// dead for as long as it may take, and then it does. `still` turns, in which the
    /// whole keeper stands still, are part of it.
    #[test]
    fn it_bites_whom_it_should_and_nobody_else(
        story in prop::collection::vec((happens(), prop::bool::weighted(0.05)), 1..200),
        lease_ms in 600_u64..12_000,
    ) {
        let mut watchdog = Watchdog::default();
        let (mut now, mut ends) = (at(1_000_000), at(0));
        let (mut open, mut alive) = (false, false);
        // When the VMs that are alive had no right to be any more.
        let mut over: Option<BootTime> = None;
        // The device: when it was fed last, and the time that it is set to.
        let mut device: Option<(BootTime, u32)> = None;
        for ((happens, pause_ms), still) in story {
            now = now.plus_ms(if still { pause_ms * 20 } else { pause_ms });
            if let Some((fed, timeout_s)) = device {
                let bites = fed.plus_ms(u64::from(timeout_s) * 1_000);
                if bites <= now {
                    prop_assert!(alive, "nothing was alive");
                    let lost = over.unwrap_or(ends);
                    prop_assert!(bites >= lost.plus_ms(DEATH_MS), "bites at {bites:?}, lost at {lost:?}");
                    return Ok(());
                }
            }
            // The lease thread, which is on time unless everything stands still.
            if open && ends <= now {
                open = false;
                over = over.or(alive.then_some(ends));
            }
            match happens {
                Happens::Start if open => alive = true,
                Happens::Die => (alive, over) = (false, None),
                Happens::Grant if open => ends = now.plus_ms(lease_ms),
                Happens::Grant if !alive => (open, ends) = (true, now.plus_ms(lease_ms)),
                Happens::Close if open => {
                    open = false;
                    over = alive.then_some(now);
                }
                _ => {}
            }
            let seen = Seen { held: open && now < ends, ends, alive, lease_ms };
            match watchdog.turn(now, seen) {
                Act::Rest | Act::Leave => {
                    let undead = over.is_some_and(|over| now.ms_since(over) >= DEATH_MS);
                    prop_assert!(device.is_none() || undead, "not fed");
                    prop_assert!(device.is_some() || !alive || undead, "not armed");
                }
                Act::Arm(timeout_s) | Act::Retime(timeout_s) => {
                    prop_assert!(alive);
                    device = Some((now, timeout_s));
                    watchdog.armed(timeout_s);
                }
                Act::Feed => device = device.map(|(_, timeout_s)| (now, timeout_s)),
                Act::Disarm => {
                    prop_assert!(!alive);
                    device = None;
                    watchdog.disarmed();
                }
            }
            // Whoever does not die is never fed beyond its time, so it is reset.
            if let (Some(over), Some((fed, timeout_s))) = (over, device) {
                prop_assert!(fed < over.plus_ms(DEATH_MS));
                prop_assert!(u64::from(timeout_s) * 1_000 >= lease_ms + DEATH_MS);
            }
        }
    }
}
