//! Scenarios: a calm world in which only what is written happens.

use holdfast_core::Profile;

use crate::script::Scenario;
use crate::world::{Setting, World};

/// Plays a scenario; the log is for people, with seconds in front.
pub fn play(scenario: &Scenario) -> String {
    let setting = Setting {
        seed: 0,
        nodes: scenario.nodes,
        memory_mib: scenario.memory_mib,
        profile: Profile::Default,
        witness: scenario.witness,
        luns: false,
        calm: true,
        mutation: None,
        trace: true,
        image_locks: false,
    };
    let mut world = World::new(setting, scenario.steps.clone());
    world.run_until(scenario.end_ms);
    let unsettled = world.unsettled();
    let mut log = String::new();
    for (at, text) in world.into_timeline() {
        log += &format!("{:8.3} {text}\n", at as f64 / 1e9);
    }
    for what in unsettled {
        log += &format!("     end {what}\n");
    }
    log
}
