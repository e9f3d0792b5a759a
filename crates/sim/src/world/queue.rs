//! What is still to happen, in order of time, and of its making at the same time.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::Event;

/// The events to come. The heap moves small keys; the events stay where they are.
#[derive(Default)]
pub struct Queue {
    keys: BinaryHeap<Reverse<(u64, u64, u32)>>,
    events: Vec<Option<Event>>,
    free: Vec<u32>,
    made: u64,
}

impl Queue {
    /// Adds an event at a moment in nanoseconds.
    pub fn push(&mut self, at: u64, event: Event) {
        self.made += 1;
        let place = match self.free.pop() {
            Some(place) => {
                self.events[place as usize] = Some(event);
                place
            }
            None => {
                self.events.push(Some(event));
                self.events.len() as u32 - 1
            }
        };
        self.keys.push(Reverse((at, self.made, place)));
    }

    /// Takes the next event out, unless it is later than `until`.
    pub fn pop(&mut self, until: u64) -> Option<(u64, Event)> {
        let Reverse((at, ..)) = self.keys.peek().filter(|Reverse((at, ..))| *at <= until)?;
        let at = *at;
        let Reverse((.., place)) = self.keys.pop()?;
        self.free.push(place);
        self.events[place as usize].take().map(|event| (at, event))
    }
}
