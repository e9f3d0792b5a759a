//! Waiting for the cluster: look, then look again at every change that a node
//! tells of, until a deadline.

use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};
use holdfast_api::{Event, JobState, JobView, NodeView, VmView};

use super::{ApiClient, Cluster};

/// What no change tells of (who votes, who reaches a volume) is looked at this often.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// A node may have been cut off meanwhile: another is chosen after so long.
const CHOOSE_EVERY: Duration = Duration::from_secs(2);
/// How long a node may take to say how it stands before others count too.
const STAND_WITHIN: Duration = Duration::from_secs(3);
/// Before a node that does not answer is tried again.
const RETRY: Duration = Duration::from_millis(10);

impl Cluster {
    /// A client of a node that answers: the coordinator, when a node that is in
    /// touch with a quorum knows one. It is the first to know what was agreed on,
    /// so whoever asks here finds there what another node has acknowledged.
    ///
    /// # Errors
    /// When no node answers.
    pub fn any(&self) -> Result<ApiClient, super::ApiError> {
        let powered: Vec<_> = self.hosts().into_iter().filter(|host| host.is_on()).collect();
        let (tell, told) = mpsc::channel();
        for host in &powered {
            let (client, tell) = (self.client(host.name()).within(STAND_WITHIN), tell.clone());
            // A node that hangs must not hold the others up; its thread ends with its deadline.
            std::thread::spawn(move || drop(tell.send((client.cluster(), client))));
        }
        drop(tell);
        let mut second_best = None;
        let mut failure = None;
        while let Ok((stands, client)) = told.recv_timeout(STAND_WITHIN) {
            let client = ApiClient::new(client.socket());
            match stands {
                Ok(view) => {
                    let in_touch = view.quorum.connected >= view.quorum.needed;
                    if let Some(coordinator) = view.coordinator.filter(|_| in_touch) {
                        return Ok(self.client(&coordinator));
                    }
                    if second_best.as_ref().is_none_or(|(revision, _)| *revision < view.revision) {
                        second_best = Some((view.revision, client));
                    }
                }
                Err(error) => failure = Some(error),
            }
        }
        let none = || super::ApiError::NoAnswer {
            socket: self.lab().directory().to_owned(),
            request: "any request".into(),
            source: std::io::Error::other("no node has power"),
        };
        second_best.map(|(_, client)| client).ok_or_else(|| failure.unwrap_or_else(none))
    }

    /// Waits until the agent of a host answers, whether it is in a cluster or not.
    ///
    /// # Errors
    /// When it does not within `deadline`.
    pub fn wait_api(&self, host: &str, deadline: Duration) -> Result<()> {
        let client = self.client(host);
        let until = Instant::now() + deadline;
        loop {
            match client.cluster() {
                Ok(_) => return Ok(()),
                Err(error) if error.status().is_some() => return Ok(()),
                Err(error) if Instant::now() >= until => {
                    return Err(self.with_logs(anyhow!(error)).context(format!("host {host}: no API in {deadline:?}")));
                }
                Err(_) => std::thread::sleep(RETRY),
            }
        }
    }

    /// Waits until `look` finds something, asking a node that is in touch with a quorum.
    ///
    /// # Errors
    /// When `look` found nothing within `deadline`: with the cluster's state.
    pub fn wait<T>(&self, what: &str, deadline: Duration, look: impl FnMut(&ApiClient) -> Option<T>) -> Result<T> {
        self.wait_with(what, deadline, || self.any().ok(), look)
    }

    /// The same, asking one host and no other.
    ///
    /// # Errors
    /// As for [`Cluster::wait`].
    pub fn wait_on<T>(
        &self,
        host: &str,
        what: &str,
        deadline: Duration,
        look: impl FnMut(&ApiClient) -> Option<T>,
    ) -> Result<T> {
        self.wait_with(what, deadline, || Some(self.client(host)), look)
    }

    fn wait_with<T>(
        &self,
        what: &str,
        deadline: Duration,
        choose: impl Fn() -> Option<ApiClient>,
        mut look: impl FnMut(&ApiClient) -> Option<T>,
    ) -> Result<T> {
        let begun = Instant::now();
        let until = begun + deadline;
        while Instant::now() < until {
            let Some((client, mut changes)) =
                choose().and_then(|client| Some((client.clone(), client.changes().ok()?)))
            else {
                std::thread::sleep(RETRY);
                continue;
            };
            let choose_again = (Instant::now() + CHOOSE_EVERY).min(until);
            // The stream first, then the look: nothing is missed in between.
            loop {
                if let Some(found) = look(&client) {
                    return Ok(found);
                }
                if Instant::now() >= choose_again || changes.next(LOOK_EVERY).is_err() {
                    break;
                }
            }
        }
        bail!("not within {:?}: {what}\n{}", begun.elapsed(), self.diagnosis())
    }

    /// Waits until `wanted` holds of a VM.
    ///
    /// # Errors
    /// When it does not within `deadline`: with the cluster's state.
    pub fn wait_vm(&self, name: &str, deadline: Duration, wanted: impl Fn(&VmView) -> bool) -> Result<VmView> {
        self.wait(&format!("what was wanted of VM {name}"), deadline, |client| client.vm(name).ok().filter(&wanted))
    }

    /// Waits until `wanted` holds of a node.
    ///
    /// # Errors
    /// As for [`Cluster::wait_vm`].
    pub fn wait_node(&self, name: &str, deadline: Duration, wanted: impl Fn(&NodeView) -> bool) -> Result<NodeView> {
        self.wait(&format!("what was wanted of node {name}"), deadline, |client| {
            client.nodes().ok()?.into_iter().find(|node| node.name == name).filter(&wanted)
        })
    }

    /// Waits until a job has ended, and returns how.
    ///
    /// # Errors
    /// When it goes on beyond `deadline`, or is not known any more.
    pub fn wait_job(&self, id: u64, deadline: Duration) -> Result<JobView> {
        self.wait(&format!("the end of job {id}"), deadline, |client| {
            client.job(id).ok().filter(|job| job.state != JobState::Running)
        })
    }

    /// Waits until a job has done its work.
    ///
    /// # Errors
    /// When it failed, was cancelled or goes on beyond `deadline`.
    pub fn job_done(&self, job: &JobView, deadline: Duration) -> Result<JobView> {
        let ended = self.wait_job(job.id, deadline)?;
        if ended.state != JobState::Done {
            bail!("job {} ended otherwise: {ended:#?}\n{}", job.id, self.diagnosis());
        }
        Ok(ended)
    }

    /// Waits for an event with an index above `since` of which `wanted` holds, and
    /// returns it with the moment of its arrival here: the quickest way to see
    /// what the coordinator decided.
    ///
    /// # Errors
    /// When there is none within `deadline`.
    pub fn wait_event(
        &self,
        since: u64,
        deadline: Duration,
        wanted: impl Fn(&Event) -> bool,
    ) -> Result<(Event, Instant)> {
        let until = Instant::now() + deadline;
        let mut seen = since;
        while Instant::now() < until {
            let Some(mut events) = self.any().ok().and_then(|client| client.follow_events(seen).ok()) else {
                std::thread::sleep(RETRY);
                continue;
            };
            let choose_again = (Instant::now() + CHOOSE_EVERY).min(until);
            while let Ok(event) = events.next(choose_again.saturating_duration_since(Instant::now())) {
                let Some(event) = event else { break };
                seen = seen.max(event.index);
                if wanted(&event) {
                    return Ok((event, Instant::now()));
                }
            }
        }
        bail!("no such event within {deadline:?}\n{}", self.diagnosis())
    }

    /// The index of the last event so far.
    ///
    /// # Errors
    /// When no node answers.
    pub fn last_event(&self) -> Result<u64> {
        Ok(self.any()?.events(0)?.last().map_or(0, |event| event.index))
    }
}
