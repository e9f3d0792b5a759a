//! The commands that Holdfast uses, typed.

use std::time::Duration;

use holdfast_core::{Epoch, VmId};
use serde::Deserialize;
use serde_json::{Value, json};
use uuid::Uuid;

use super::{MigrationProgress, MigrationStatus, Qmp, RunState, Status};
use crate::QemuError;

/// How long QEMU may take to answer. Its monitor shares a thread with its
/// devices, so a moment's silence under load is nothing unusual.
const DEADLINE: Duration = Duration::from_secs(5);

/// Commands that may wait for the disks.
const DISK_DEADLINE: Duration = Duration::from_secs(30);

/// What the running QEMU was started as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The VM.
    pub vm: VmId,
    /// The epoch; `None` when it was not started from a [`crate::Launch`].
    pub epoch: Option<Epoch>,
}

/// What a disk did since QEMU started.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlockStats {
    /// The disk's id: `disk0`, `disk1` …
    pub disk: String,
    /// Bytes that the guest read.
    pub read_bytes: u64,
    /// Bytes that the guest wrote.
    pub written_bytes: u64,
    /// Reads that succeeded.
    pub reads: u64,
    /// Writes that succeeded.
    pub writes: u64,
    /// Flushes that succeeded.
    pub flushes: u64,
    /// Requests that failed.
    pub failed: u64,
}

#[derive(Deserialize)]
struct Chardev {
    label: String,
}

#[derive(Deserialize)]
struct QueriedUuid {
    #[serde(rename = "UUID")]
    uuid: Uuid,
}

#[derive(Deserialize)]
struct BlockStatsEntry {
    #[serde(default)]
    qdev: String,
    stats: BlockCounters,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct BlockCounters {
    rd_bytes: u64,
    wr_bytes: u64,
    rd_operations: u64,
    wr_operations: u64,
    flush_operations: u64,
    failed_rd_operations: u64,
    failed_wr_operations: u64,
    failed_flush_operations: u64,
}

/// Every command fails with [`QemuError::Gone`] when QEMU has ended, with
/// [`QemuError::Timeout`] when it does not answer within seconds, and with
/// [`QemuError::Refused`] when it says no.
impl Qmp {
    async fn ask(&self, command: &'static str, arguments: Value) -> Result<(), QemuError> {
        self.execute::<Value>(command, arguments, DEADLINE).await.map(drop)
    }

    /// Which VM this is, under which epoch: to be checked before a QEMU that
    /// was found running is adopted.
    pub async fn identity(&self) -> Result<Identity, QemuError> {
        let QueriedUuid { uuid } = self.execute("query-uuid", json!({}), DEADLINE).await?;
        let chardevs: Vec<Chardev> = self.execute("query-chardev", json!({}), DEADLINE).await?;
        let epoch = chardevs
            .iter()
            .find_map(|chardev| chardev.label.strip_prefix(crate::command_line::EPOCH_LABEL))
            .and_then(|number| number.parse().ok())
            .map(Epoch);
        Ok(Identity { vm: VmId(uuid), epoch })
    }

    /// What the guest's processors do.
    pub async fn query_status(&self) -> Result<Status, QemuError> {
        self.execute("query-status", json!({}), DEADLINE).await
    }

    /// How the latest migration stands, from here or to here.
    pub async fn query_migrate(&self) -> Result<MigrationProgress, QemuError> {
        self.execute("query-migrate", json!({}), DEADLINE).await
    }

    /// Lets the processors run; nothing happens when they do already.
    ///
    /// A guest that arrived by migration may be continued only when its source
    /// has said [`crate::Word::Sent`] or is fenced: see [`crate::word`].
    ///
    /// # Errors
    /// [`QemuError::NotHere`] when the guest was handed to another QEMU, is on
    /// its way, or is not wholly here: QEMU itself would let a guest run that was
    /// handed over long ago.
    pub async fn resume(&self) -> Result<(), QemuError> {
        let status = self.guest_is_here().await?;
        if status.running {
            return Ok(());
        }
        self.go_on().await
    }

    /// Lets the processors run, whatever there is to run: for who knows that the
    /// guest is here.
    pub(crate) async fn go_on(&self) -> Result<(), QemuError> {
        self.ask("cont", json!({})).await
    }

    /// Makes the processors stand still.
    pub async fn pause(&self) -> Result<(), QemuError> {
        self.ask("stop", json!({})).await
    }

    /// Presses the power button: the guest may shut down, or ignore it.
    pub async fn powerdown(&self) -> Result<(), QemuError> {
        self.ask("system_powerdown", json!({})).await
    }

    /// Resets the guest.
    ///
    /// # Errors
    /// [`QemuError::NotHere`] as for [`Qmp::resume`]: a reset would wipe the
    /// state that says that the guest was handed over.
    pub async fn reset(&self) -> Result<(), QemuError> {
        self.guest_is_here().await?;
        self.ask("system_reset", json!({})).await
    }

    /// Ends QEMU: flushes the disks and exits. Answers before it has ended.
    pub async fn quit(&self) -> Result<(), QemuError> {
        match self.ask("quit", json!({})).await {
            // It may be faster than its answer.
            Err(QemuError::Gone { .. }) => Ok(()),
            other => other,
        }
    }

    /// Announces the guest's hardware addresses to the network, now and `rounds`
    /// times in all, `step` apart. Only a running guest's adapters announce.
    pub async fn announce_self(&self, rounds: u32, step: Duration) -> Result<(), QemuError> {
        let step = u64::try_from(step.as_millis()).unwrap_or(u64::MAX).max(1);
        self.ask("announce-self", json!({"initial": step, "max": step, "rounds": rounds, "step": 0})).await
    }

    /// Tells the guest that disk `index` has a new size, and makes it so.
    pub async fn block_resize(&self, index: usize, size_bytes: u64) -> Result<(), QemuError> {
        let arguments = json!({
            "node-name": crate::command_line::disk_id(index),
            "size": size_bytes,
        });
        self.execute::<Value>("block_resize", arguments, DISK_DEADLINE).await.map(drop)
    }

    /// What each disk did since QEMU started.
    pub async fn block_stats(&self) -> Result<Vec<BlockStats>, QemuError> {
        let entries: Vec<BlockStatsEntry> = self.execute("query-blockstats", json!({}), DEADLINE).await?;
        Ok(entries
            .into_iter()
            .filter_map(|BlockStatsEntry { qdev, stats }| {
                let disk = qdev.split('/').find(|part| part.starts_with("disk"))?;
                Some(BlockStats {
                    disk: disk.to_owned(),
                    read_bytes: stats.rd_bytes,
                    written_bytes: stats.wr_bytes,
                    reads: stats.rd_operations,
                    writes: stats.wr_operations,
                    flushes: stats.flush_operations,
                    failed: stats.failed_rd_operations + stats.failed_wr_operations + stats.failed_flush_operations,
                })
            })
            .collect())
    }

    pub(crate) async fn migrate_set_capabilities(&self, capabilities: &[(&str, bool)]) -> Result<(), QemuError> {
        let list: Vec<Value> =
            capabilities.iter().map(|(name, state)| json!({"capability": name, "state": state})).collect();
        self.ask("migrate-set-capabilities", json!({"capabilities": list})).await
    }

    pub(crate) async fn migrate_set_parameters(&self, parameters: Value) -> Result<(), QemuError> {
        self.ask("migrate-set-parameters", parameters).await
    }

    pub(crate) async fn migrate_incoming(&self, uri: &str) -> Result<(), QemuError> {
        self.ask("migrate-incoming", json!({"uri": uri})).await
    }

    pub(crate) async fn migrate(&self, uri: &str) -> Result<(), QemuError> {
        self.ask("migrate", json!({"uri": uri})).await
    }

    pub(crate) async fn migrate_cancel(&self) -> Result<(), QemuError> {
        self.ask("migrate_cancel", json!({})).await
    }

    /// Refuses unless the guest is this QEMU's and no migration is under way.
    async fn guest_is_here(&self) -> Result<Status, QemuError> {
        let status = self.query_status().await?;
        let migration = self.query_migrate().await?.status;
        // A guest that was paused when its migration failed or was cancelled is
        // left in `postmigrate` although it never went anywhere.
        let came_to_nothing = status.state == RunState::PostMigrate
            && matches!(migration, MigrationStatus::Failed | MigrationStatus::Cancelled);
        let on_its_way = !migration.is_over() && !status.running;
        if (status.state.may_continue() || came_to_nothing) && !on_its_way {
            return Ok(status);
        }
        Err(QemuError::NotHere {
            socket: self.socket().to_owned(),
            state: format!("{} (migration: {migration})", status.state),
        })
    }
}
