//! Jobs and events: waiting, following, cancelling.

use std::io::IsTerminal;
use std::time::Duration;

use holdfast_api as api;
use indicatif::{ProgressBar, ProgressStyle};
use tokio::time::Instant;

use super::args::JobCommand;
use super::client::{Client, ClientError};
use super::{CliError, Done, output};

/// How long an agent that went away may take to come back: it may be upgraded,
/// and its host may be electing a coordinator.
const COME_BACK_WITHIN: Duration = Duration::from_secs(30);
/// The pause between attempts to reach it.
const RETRY_AFTER: Duration = Duration::from_millis(250);

/// `holdfast job`.
pub async fn job(client: &Client, command: JobCommand, json: bool) -> Done {
    let (job, follow) = match command {
        JobCommand::List => {
            let jobs: Vec<api::JobView> = client.get("/api/v1/jobs").await?;
            if json {
                return output::json(&jobs);
            }
            let row = |job: &api::JobView| {
                let what = format!("{} {}", job.work, job.vm);
                let done = format!("{} %", job.percent);
                [job.id.to_string(), what, output::word(&job.state), done, output::moment(job.began_ms), note(job)]
            };
            return output::table(["id", "work", "state", "done", "began", "note"], jobs.iter().map(row));
        }
        JobCommand::Show { id, follow } => (client.get(&format!("/api/v1/jobs/{id}")).await?, follow),
        JobCommand::Cancel { id, follow } => (client.post(&format!("/api/v1/jobs/{id}/cancel"), &()).await?, follow),
    };
    if follow {
        return finish(client, job, json).await;
    }
    show(&job, json)
}

fn show(job: &api::JobView, json: bool) -> Done {
    if json {
        return output::json(job);
    }
    let mut facts = vec![
        ("job", job.id.to_string()),
        ("work", format!("{} {}", job.work, job.vm)),
        ("state", output::word(&job.state)),
        ("done", format!("{} %", job.percent)),
        ("asked for by", job.by.clone()),
        ("began", output::moment(job.began_ms)),
    ];
    if let (Some(from), Some(to)) = (&job.from, &job.to) {
        facts.push(("moves", format!("from {from} to {to}")));
    }
    if let Some(outcome) = &job.outcome {
        facts.push(("ended", output::moment(outcome.at_ms)));
    }
    if let Some(moved) = &job.moved {
        facts.push(("took", format!("{} ms, the guest stood still for {} ms", moved.total_ms, moved.downtime_ms)));
    }
    if !note(job).is_empty() {
        facts.push(("note", note(job)));
    }
    output::facts(&facts)
}

/// Why it failed, or else what it is doing.
fn note(job: &api::JobView) -> String {
    job.outcome.as_ref().and_then(|outcome| outcome.why.clone()).unwrap_or_else(|| job.note.clone())
}

/// Waits for a job that was just begun, or prints its number when nobody waits.
pub async fn wait(client: &Client, job: api::JobView, no_wait: bool, json: bool) -> Done {
    match (no_wait, json) {
        (true, true) => output::json(&job),
        (true, false) => output::line(&job.id.to_string()),
        (false, _) => finish(client, job, json).await,
    }
}

/// Waits until a job ends, showing its progress, and says how it ended.
async fn finish(client: &Client, mut job: api::JobView, json: bool) -> Done {
    let progress = Progress::new(&job, json);
    let path = format!("/api/v1/jobs/{}?wait=1", job.id);
    let mut reached = Instant::now();
    while job.state == api::JobState::Running {
        progress.show(&job);
        match client.get(&path).await {
            Ok(now) => {
                job = now;
                reached = Instant::now();
            }
            // The job goes on without this agent: it may come back.
            Err(ClientError::Unreachable { .. } | ClientError::Lost { .. }) if reached.elapsed() < COME_BACK_WITHIN => {
                tokio::time::sleep(RETRY_AFTER).await;
            }
            Err(error) => return Err(error.into()),
        }
    }
    progress.end(&job);
    if json {
        output::json(&job)?;
    }
    let what = format!("{} {} (job {})", job.work, job.vm, job.id);
    match job.state {
        api::JobState::Done | api::JobState::Running => Ok(()),
        api::JobState::Cancelled => Err(CliError::Job(format!("{what} was cancelled"))),
        api::JobState::Failed => {
            let why = job.outcome.and_then(|outcome| outcome.why).unwrap_or_default();
            Err(CliError::Job(format!("{what} failed: {why}")))
        }
    }
}

/// A bar on a terminal; plain lines, one per new step, elsewhere.
enum Progress {
    Bar(ProgressBar),
    Lines(std::cell::RefCell<String>),
    Silent,
}

impl Progress {
    fn new(job: &api::JobView, json: bool) -> Self {
        if json {
            return Progress::Silent;
        }
        if !std::io::stderr().is_terminal() {
            return Progress::Lines(Default::default());
        }
        let bar = ProgressBar::new(100).with_prefix(format!("{} {}", job.work, job.vm));
        if let Ok(style) = ProgressStyle::with_template("{prefix} [{bar:30}] {percent:>3} % {elapsed} {wide_msg}") {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.enable_steady_tick(Duration::from_millis(100));
        Progress::Bar(bar)
    }

    fn show(&self, job: &api::JobView) {
        match self {
            Progress::Bar(bar) => {
                bar.set_position(job.percent.into());
                bar.set_message(job.note.clone());
            }
            Progress::Lines(last) => {
                let mut last = last.borrow_mut();
                if *last != job.note && !job.note.is_empty() {
                    eprintln!("{} {}: {}", job.work, job.vm, job.note);
                    last.clone_from(&job.note);
                }
            }
            Progress::Silent => {}
        }
    }

    fn end(&self, job: &api::JobView) {
        let took = job.outcome.as_ref().map_or(0, |outcome| outcome.at_ms.saturating_sub(job.began_ms));
        let mut text = format!("{} {}: {} after {}", job.work, job.vm, output::word(&job.state), seconds(took));
        if let Some(moved) = &job.moved {
            text += &format!(", the guest stood still for {} ms", moved.downtime_ms);
        }
        match self {
            Progress::Bar(bar) => {
                bar.finish_and_clear();
                eprintln!("{text}");
            }
            Progress::Lines(_) => eprintln!("{text}"),
            Progress::Silent => {}
        }
    }
}

fn seconds(ms: u64) -> String {
    format!("{}.{:03} s", ms / 1000, ms % 1000)
}

/// `holdfast events`.
pub async fn events(client: &Client, follow: bool, since: u64, json: bool) -> Done {
    if !follow {
        let events: Vec<api::Event> = client.get(&format!("/api/v1/events?since={since}")).await?;
        if json {
            return output::json(&events);
        }
        return events.iter().try_for_each(|event| output::line(&text(event)));
    }
    let mut last = since;
    let mut stream = client.events("/api/v1/events/stream", last).await?;
    loop {
        while let Some(data) = stream.next().await {
            let event: api::Event = serde_json::from_str(&data)
                .map_err(|error| CliError::Local(format!("an event cannot be read ({error}): {data}")))?;
            last = event.index;
            // One line each, so that a program can read them as they come.
            output::line(&if json { data } else { text(&event) })?;
        }
        stream = reopen(client, last).await?;
    }
}

/// Opens the stream again after a break: the agent may have been upgraded.
async fn reopen(client: &Client, last: u64) -> Result<super::client::Events, CliError> {
    let until = Instant::now() + COME_BACK_WITHIN;
    loop {
        tokio::time::sleep(RETRY_AFTER).await;
        match client.events("/api/v1/events/stream", last).await {
            Ok(stream) => return Ok(stream),
            Err(error) if Instant::now() >= until => return Err(error.into()),
            Err(_) => {}
        }
    }
}

fn text(event: &api::Event) -> String {
    let mark = match event.severity {
        api::Severity::Info => "",
        api::Severity::Warning => "warning: ",
        api::Severity::Error => "error: ",
    };
    format!("{:>6}  {}  {mark}{}: {}", event.index, output::moment(event.at_ms), event.subject, event.text)
}
