//! The generation of this node's cluster: which of the histories that a forced
//! quorum may have split it into this node obeys (docs/decisions/0018).
//!
//! ```text
//!  survivor:  force ──▶ {n+1, forcing}  restart: wait out leases, change the log ──▶ {n+1}
//!  left out:  meets n+1 ──▶ {n+1, stepping aside}  restart: log set aside ──▶ {n+1}, learns anew
//! ```
//! The file is written first and says what is left to do, and doing it twice does
//! no harm: whenever a crash comes, the node is in the old generation or goes on
//! becoming one of the new.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use holdfast_core::{Generation, NodeId, Proposal};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use crate::agent::now_ms;
use crate::http;
use crate::identity::{self, write_durably};

/// In calls between nodes and in their answers: the generation that the sender obeys.
pub const GENERATION: &str = "holdfast-generation";
/// The file in the state directory.
pub const FILE: &str = "generation.json";
/// The version of its format.
const FORMAT: u32 = 1;

/// What is in the file.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Kept {
    format: u32,
    /// The generation that this node obeys.
    pub generation: Generation,
    /// What is left to do before it may take part in it.
    pub left_to_do: Option<Step>,
    /// It began here: by this node's own log. Every other node reads of it.
    #[serde(default)]
    pub survivor: bool,
}

/// What is left to do after the generation has changed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Step {
    /// This node is to go on alone, by its own log.
    Force {
        /// What tells the state of it.
        proposal: Box<Proposal>,
        /// How long leases may be out that the others granted, in milliseconds.
        leases_over_ms: u64,
    },
    /// What this node knows is of an older generation: it learns anew.
    StepAside,
}

impl Kept {
    /// Reads the file; the first generation when there is none.
    ///
    /// # Errors
    /// It is damaged, or a newer version's.
    pub fn load(state_dir: &Path) -> Result<Kept> {
        let path = state_dir.join(FILE);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Kept::of(Generation::default(), None));
            }
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
        };
        let kept: Kept = serde_json::from_slice(&bytes).with_context(|| {
            format!(
                "{} is damaged. This host does not start, because it might obey a coordinator that was left out when a \
                 quorum was forced. Copy the file from another node of the cluster",
                path.display()
            )
        })?;
        if kept.format != FORMAT {
            bail!(
                "{} has format {}, this version of Holdfast knows {FORMAT}: start the newer version again",
                path.display(),
                kept.format
            );
        }
        Ok(kept)
    }

    /// Writes the file, whole or not at all.
    ///
    /// # Errors
    /// The disk refuses it.
    pub fn store(state_dir: &Path, generation: Generation, left_to_do: Option<Step>) -> Result<()> {
        Kept::of(generation, left_to_do).write(state_dir)
    }

    fn of(generation: Generation, left_to_do: Option<Step>) -> Kept {
        let survivor = matches!(left_to_do, Some(Step::Force { .. }));
        Kept { format: FORMAT, generation, left_to_do, survivor }
    }

    fn write(&self, state_dir: &Path) -> Result<()> {
        write_durably(&state_dir.join(FILE), &serde_json::to_vec_pretty(self)?)
    }

    /// Does what is left to do. Consensus must not run.
    ///
    /// # Errors
    /// The log is damaged, or a disk refuses something.
    pub async fn settle(mut self, state_dir: &Path, consensus: &Path, me: NodeId) -> Result<Kept> {
        let generation = self.generation;
        match self.left_to_do.take() {
            None => return Ok(self),
            Some(Step::Force { proposal, leases_over_ms }) => {
                tracing::warn!(%generation, leases_over_ms, "a quorum is forced here: waiting until no lease is out any more");
                tokio::time::sleep(Duration::from_millis(leases_over_ms)).await;
                holdfast_consensus::force(consensus, me, *proposal).await?;
                tracing::warn!(%generation, "this node is the only voter now");
            }
            Some(Step::StepAside) => {
                if let Some(aside) = set_aside(consensus)? {
                    tracing::warn!(%generation, kept_in = %aside.display(), "a quorum was forced without this node: what it knew is set aside, and it learns anew");
                }
            }
        }
        self.write(state_dir)?;
        Ok(self)
    }
}

/// The generation that this process obeys, and what it does when it meets another.
/// It never changes: a process of another generation is another process.
pub struct Allegiance {
    generation: Generation,
    state_dir: PathBuf,
    /// Ends this agent; the keeper starts the next.
    stop: CancellationToken,
    /// A generation with the same number and another mark was met, and told of.
    torn: AtomicBool,
    /// This node was removed from the cluster.
    over: CancellationToken,
}

impl Allegiance {
    /// Obeys `generation`.
    pub fn new(generation: Generation, state_dir: PathBuf, stop: CancellationToken) -> Self {
        Allegiance { generation, state_dir, stop, torn: AtomicBool::new(false), over: CancellationToken::new() }
    }

    /// Another node says that this one was removed: it obeys nobody from here on.
    pub fn removed(&self) {
        if self.over.is_cancelled() {
            return;
        }
        match identity::set_aside(&self.state_dir) {
            Ok(kept) => {
                self.over.cancel();
                tracing::error!(kept_in = %kept.display(), "this node was removed from the cluster: it starts anew as a host without one; `holdfast node join` lets it join again");
            }
            Err(error) => {
                tracing::error!(%error, "this node was removed from the cluster, and cannot set aside what it is")
            }
        }
    }

    /// Waits until this node was removed.
    pub async fn over(&self) {
        self.over.cancelled().await;
    }

    /// Which one.
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// Takes in what the headers of a node's answer say of its generation: whether it
    /// is this one's.
    pub fn heard(&self, headers: &HeaderMap) -> bool {
        self.meet(said(headers))
    }

    /// Meets the generation of another node: whether it is this one's. Steps aside
    /// for a later one.
    fn meet(&self, other: Generation) -> bool {
        if other.number > self.generation.number && !self.stop.is_cancelled() {
            tracing::error!(ours = %self.generation, theirs = %other, "a quorum was forced without this node: it steps aside and learns anew");
            match Kept::store(&self.state_dir, other, Some(Step::StepAside)) {
                // At once, as if it had crashed: nothing of the old generation goes on.
                Ok(()) => std::process::exit(0),
                Err(error) => tracing::error!(%error, "cannot step aside; it takes no part all the same"),
            }
        } else if other.number == self.generation.number
            && other.mark != self.generation.mark
            && !self.torn.swap(true, Ordering::Relaxed)
        {
            tracing::error!(ours = %self.generation, theirs = %other, "a quorum was forced on both sides of a split: switch one side off, and have its hosts join anew");
        }
        other == self.generation
    }

    /// Becomes the only voter of a new generation when this process has ended.
    ///
    /// # Errors
    /// The disk refuses it; nothing has changed then.
    pub fn force(&self, generation: Generation, proposal: Proposal, leases_over: Duration) -> Result<()> {
        let leases_over_ms = leases_over.as_millis() as u64;
        Kept::store(&self.state_dir, generation, Some(Step::Force { proposal: Box::new(proposal), leases_over_ms }))?;
        self.stop.cancel();
        Ok(())
    }
}

fn said(headers: &HeaderMap) -> Generation {
    let text = headers.get(GENERATION).and_then(|value| value.to_str().ok());
    text.and_then(|text| text.parse().ok()).unwrap_or_default()
}

/// Lets calls of nodes pass that obey the same generation, and tells the others. It
/// comes before it is asked who may call: whether a node was removed is a matter of
/// each generation.
pub async fn gate(State(allegiance): State<Arc<Allegiance>>, request: Request, next: Next) -> Response {
    if !http::is_call_of_a_node(&request) {
        return next.run(request).await;
    }
    let mut response = match allegiance.meet(said(request.headers())) {
        true => next.run(request).await,
        false => (StatusCode::CONFLICT, "a quorum was forced, and the nodes obey different generations of the cluster")
            .into_response(),
    };
    if let Ok(value) = HeaderValue::from_str(&allegiance.generation().to_string()) {
        response.headers_mut().insert(GENERATION, value);
    }
    response
}

/// Gives a directory another name; `None` when there is nothing.
fn set_aside(consensus: &Path) -> Result<Option<PathBuf>> {
    if !consensus.exists() {
        return Ok(None);
    }
    let aside = consensus.with_extension(format!("left-out-{}", now_ms()));
    std::fs::rename(consensus, &aside)
        .and_then(|()| std::fs::File::open(consensus.parent().unwrap_or(Path::new("/")))?.sync_all())
        .with_context(|| format!("cannot rename {} to {}", consensus.display(), aside.display()))?;
    Ok(Some(aside))
}
