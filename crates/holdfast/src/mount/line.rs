//! The line to the agent. It ends with the agent, and this process with it.

use std::collections::BTreeMap;
use std::io::{BufRead as _, Write as _};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex};

use fuser::Errno;

use super::locked;
use super::protocol::{Answer, Answered, Ask, Asked};

/// The line to the agent.
pub struct Line {
    waiting: Mutex<BTreeMap<u64, SyncSender<Answer>>>,
    next: AtomicU64,
}

impl Line {
    /// Listens to the agent from now on.
    ///
    /// # Errors
    /// There is no thread for that.
    pub fn open() -> std::io::Result<Arc<Line>> {
        let line = Arc::new(Line { waiting: Mutex::default(), next: AtomicU64::new(1) });
        let hears = line.clone();
        std::thread::Builder::new().name("agent".into()).spawn(move || {
            for text in std::io::stdin().lock().lines().map_while(Result::ok) {
                let Ok(Answered { id, answer }) = serde_json::from_str(&text) else { break };
                if let Some(waiting) = locked(&hears.waiting).remove(&id) {
                    let _ = waiting.send(answer);
                }
            }
            // The agent's successor mounts anew; whoever has a file open gets an error.
            std::process::exit(0);
        })?;
        Ok(line)
    }

    /// Asks the agent and waits for its answer, which always comes, or this process ends.
    ///
    /// # Errors
    /// What the agent says.
    pub fn ask(&self, ask: Ask) -> Result<Answer, Errno> {
        self.ask_numbered(ask).map(|(_, answer)| answer)
    }

    /// As [`Line::ask`]; says the question's number, too.
    ///
    /// # Errors
    /// What the agent says.
    pub fn ask_numbered(&self, ask: Ask) -> Result<(u64, Answer), Errno> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (send, receive) = sync_channel(1);
        locked(&self.waiting).insert(id, send);
        let text = serde_json::to_string(&Asked { id, ask }).map_err(|_| Errno::EIO)?;
        let mut out = std::io::stdout().lock();
        let said = writeln!(out, "{text}").and_then(|()| out.flush());
        drop(out);
        if let Err(error) = said {
            locked(&self.waiting).remove(&id);
            return Err(error.into());
        }
        match receive.recv() {
            Ok(Answer::Failed { errno }) => Err(Errno::from_i32(errno)),
            Ok(answer) => Ok((id, answer)),
            Err(_) => Err(Errno::EIO),
        }
    }
}
