//! A whole keeper with a watchdog, in the cases for which it has one.

use nix::sys::signal::{Signal, kill};

use super::*;
use crate::keeper::watchdog::stand_in::{Note, StandIn};
use holdfast_core::watchdog::Standing;

const ARMED: Note = Note::Armed { recorded: true };

/// A lab whose keepers have a watchdog.
fn watched() -> (Lab, StandIn) {
    let mut lab = Lab::new();
    let device = StandIn::new(lab.run_dir().join("watchdog.json"));
    lab.watchdog = Some(device.root());
    (lab, device)
}

/// A VM that does not die from SIGKILL before the stand-in lets go of it: it reads a
/// file, and its kernel waits for the answer, whatever happens to it.
async fn undying(lab: &Lab, device: &StandIn, keeper: &Running) -> std::os::fd::OwnedFd {
    let file = format!("if={}", device.stuck().display());
    let process = keeper.started(lab.start_program(1, 1, 1, &["dd", &file, "of=/dev/null", "count=1"])).await;
    device.wait("a reader", |state| !state.stuck.is_empty());
    process
}

#[tokio::test]
async fn a_lost_lease_does_not_keep_the_watchdog_from_being_fed() {
    let (lab, device) = watched();
    let mut keeper = lab.keeper().await;
    assert!(matches!(keeper.hello().await.watchdog, Standing::Ready { .. }));
    lab.grant(&mut keeper, 1).await;
    let process = keeper.started(lab.start(1, 1, 1)).await;
    let armed = device.wait("armed and fed", |state| state.feedings > 2);
    assert_eq!(armed, [ARMED, Note::Set(10)]);
    lab.leases.set_authority(Authority::NONE);
    let ended = device.wait("disarmed", |state| state.notes.ends_with(&[Note::Disarmed]));
    assert_eq!(ended, [ARMED, Note::Set(10), Note::Disarmed]);
    assert!(readable(&process, Duration::ZERO), "because its VM is dead");

    lab.leases.set_authority(FOREVER);
    keeper.until(Event::LeaseGained { term: NodeTerm(1) }).await;
    keeper.started(lab.start(1, 2, 1)).await;
    device.wait("armed again", |state| state.notes.iter().filter(|note| **note == ARMED).count() == 2);
    kill(keeper.pid(), Signal::SIGTERM).unwrap();
    assert_eq!(keeper.process.wait().unwrap().code(), Some(0));
    assert_eq!(device.notes().last(), Some(&Note::Disarmed), "stopped in order");
    assert!(!device.notes().contains(&Note::Bitten));
}

#[tokio::test]
async fn a_vm_that_cannot_be_shown_dead_has_its_host_reset() {
    let (lab, device) = watched();
    let mut keeper = lab.keeper().await;
    lab.grant(&mut keeper, 1).await;
    let process = undying(&lab, &device, &keeper).await;
    device.wait("armed", |state| state.feedings > 2);
    lab.leases.set_authority(Authority::NONE);
    keeper.until(Event::LeaseLost { term: NodeTerm(1), killed: 1 }).await;
    let lost = boot_time();
    while !matches!(keeper.hello().await.watchdog, Standing::Left { timeout_s: 10, .. }) {
        assert!(!readable(&process, Duration::ZERO) && boot_time().ms_since(lost) < 60_000);
        keeper.until(Event::WatchdogChanged).await;
    }
    // Granted again, it may not be used, and changes nothing.
    lab.leases.set_authority(FOREVER);
    let fed = device.state().feedings;
    let bitten = device.wait("bitten", |state| state.notes.contains(&Note::Bitten));
    assert_eq!(bitten, [ARMED, Note::Set(10), Note::Bitten]);
    assert_eq!(device.state().feedings, fed);
    assert!(!readable(&process, Duration::ZERO), "alive all the while");
    assert!(!keeper.hello().await.lease.held);

    device.release();
    keeper.until(exited(1, 1, KILLED)).await;
    device.wait("disarmed", |state| state.notes.ends_with(&[Note::Disarmed]));
}

#[tokio::test]
async fn a_keeper_that_stands_still_has_its_host_reset() {
    let (lab, device) = watched();
    let mut keeper = lab.keeper().await;
    lab.grant(&mut keeper, 1).await;
    let process = keeper.started(lab.start(1, 1, 1)).await;
    device.wait("armed", |state| state.feedings > 0);
    kill(keeper.pid(), Signal::SIGSTOP).unwrap();
    device.wait("bitten", |state| state.notes.contains(&Note::Bitten));
    assert!(!readable(&process, Duration::ZERO));
}

#[tokio::test]
async fn the_next_keeper_disarms_what_the_last_one_left_when_its_vms_are_dead() {
    let (lab, device) = watched();
    let mut keeper = lab.keeper().await;
    lab.grant(&mut keeper, 1).await;
    let process = keeper.started(lab.start(1, 1, 1)).await;
    device.wait("armed", |state| state.feedings > 0);
    keeper.process.kill().unwrap();
    device.wait("abandoned", |state| state.notes.ends_with(&[Note::Abandoned]));
    drop(keeper);
    let keeper = lab.keeper().await;
    let ended = device.wait("disarmed", |state| state.notes.ends_with(&[Note::Disarmed]));
    assert!(!ended.contains(&Note::Bitten));
    assert!(readable(&process, Duration::ZERO));
    assert!(keeper.hello().await.leftovers.is_empty());
}

#[tokio::test]
async fn the_next_keeper_leaves_the_watchdog_alone_while_a_vm_of_the_last_lives() {
    let (lab, device) = watched();
    let mut keeper = lab.keeper().await;
    lab.grant(&mut keeper, 1).await;
    let process = undying(&lab, &device, &keeper).await;
    device.wait("armed", |state| state.feedings > 0);
    keeper.process.kill().unwrap();
    device.wait("abandoned", |state| state.notes.ends_with(&[Note::Abandoned]));
    drop(keeper);
    let keeper = lab.keeper().await;
    let greeting = keeper.hello().await;
    assert_eq!(greeting.leftovers.len(), 1, "{greeting:?}");
    assert!(matches!(greeting.watchdog, Standing::Left { .. }), "{greeting:?}");
    device.wait("bitten", |state| state.notes.contains(&Note::Bitten));
    assert!(!readable(&process, Duration::ZERO));

    device.release();
    device.wait("disarmed", |state| state.notes.ends_with(&[Note::Disarmed]));
    assert!(readable(&process, Duration::ZERO));
}
