//! Watchdog devices: which one may be used, and how it is armed and disarmed again.
//!
//! Opening a watchdog arms it, so everything that can be known is read from sysfs
//! before. A record in the run directory says that it is armed, from before it is
//! until after it is not: whoever finds one knows what an earlier keeper left armed.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use holdfast_core::watchdog::Device;
use serde::{Deserialize, Serialize};

use crate::realtime::{watchdog_feed, watchdog_set_timeout, watchdog_support};

/// Abilities that are needed, by linux/watchdog.h: WDIOF_SETTIMEOUT, WDIOF_MAGICCLOSE
/// (closed without a word, it stays armed) and WDIOF_KEEPALIVEPING.
const NEEDED: u32 = 0x80 | 0x100 | 0x8000;

/// Written before closing, it disarms.
const MAGIC: &[u8] = b"V";

/// What an administrator wants of the watchdog.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Choice {
    /// One that the host has and nothing else uses.
    Auto,
    /// None.
    Never,
    /// This one: its name in /dev.
    Named(String),
}

impl FromStr for Choice {
    type Err = String;

    fn from_str(text: &str) -> Result<Choice, String> {
        // The name without a number is the first one's older name.
        let number = text.strip_prefix("/dev/watchdog");
        match (text, number) {
            ("auto", _) => Ok(Choice::Auto),
            ("none", _) => Ok(Choice::Never),
            (_, Some("")) => Ok(Choice::Named("watchdog0".into())),
            (_, Some(number)) if number.chars().all(|c| c.is_ascii_digit()) => {
                Ok(Choice::Named(format!("watchdog{number}")))
            }
            _ => Err(format!("watchdog = {text:?}: choose \"auto\", \"none\", or a device like /dev/watchdog0")),
        }
    }
}

/// Where watchdogs are looked for, and which one is wanted.
#[derive(Clone, Debug)]
pub struct Watchdogs {
    /// Which one.
    pub choice: Choice,
    /// Where the devices are.
    pub devices: PathBuf,
    /// Where the kernel describes them.
    pub described: PathBuf,
}

impl Watchdogs {
    /// Those of this host.
    pub fn of_host(choice: Choice) -> Watchdogs {
        Watchdogs { choice, devices: "/dev".into(), described: "/sys/class/watchdog".into() }
    }

    /// The one to use.
    ///
    /// # Errors
    /// Why none; a clause.
    pub fn find(&self) -> Result<Device, String> {
        let mut names = match &self.choice {
            Choice::Never => return Err("the configuration says none".into()),
            Choice::Named(name) => return self.examine(name),
            Choice::Auto => self.names(),
        };
        // Timers of the kernel itself come last: they need a kernel that works.
        names.sort_by_key(|name| {
            (self.says(name, "identity").is_ok_and(|what| what == "Software Watchdog"), number(name))
        });
        let mut why = Vec::new();
        for name in names {
            match self.examine(&name) {
                Ok(device) => return Ok(device),
                Err(unfit) => why.push(unfit),
            }
        }
        Err(if why.is_empty() { "the host has none".into() } else { why.join(", and ") })
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.described).into_iter().flatten().flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        names.filter(|name| name.starts_with("watchdog")).collect()
    }

    fn says(&self, name: &str, what: &str) -> io::Result<String> {
        Ok(fs::read_to_string(self.described.join(name).join(what))?.trim().to_owned())
    }

    fn examine(&self, name: &str) -> Result<Device, String> {
        let path = self.devices.join(name).display().to_string();
        if !self.described.join(name).exists() {
            return Err(format!("{path} is not there"));
        }
        let asked = |what| self.says(name, what).map_err(|error| format!("{path} does not tell its {what} ({error})"));
        if asked("nowayout")? != "0" {
            return Err(format!("{path} cannot be disarmed any more once it is armed (nowayout)"));
        }
        if asked("state")? != "inactive" {
            return Err(format!("{path} is armed by something else (systemd's RuntimeWatchdogSec, or another daemon)"));
        }
        let identity = self.says(name, "identity").unwrap_or_default();
        Ok(Device { path, identity })
    }
}

fn number(name: &str) -> u32 {
    name.trim_start_matches("watchdog").parse().unwrap_or(u32::MAX)
}

/// Which watchdog is armed, or was by a keeper that is gone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Which.
    pub device: Device,
    /// Its time, in seconds.
    pub timeout_s: u32,
    /// In which boot of the host.
    boot: String,
}

/// The place of the record.
pub struct Book {
    file: PathBuf,
    boot: String,
}

impl Book {
    /// The one in a run directory, which has to exist.
    pub fn open(run_dir: &Path) -> io::Result<Book> {
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        Ok(Book { file: run_dir.join("watchdog.json"), boot: boot.trim().to_owned() })
    }

    /// What an earlier keeper left armed.
    ///
    /// # Errors
    /// There is a record that cannot be read.
    pub fn left(&self) -> io::Result<Option<Record>> {
        let bytes = match fs::read(&self.file) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            bytes => bytes?,
        };
        let record: Record = serde_json::from_slice(&bytes)?;
        Ok(Some(record).filter(|record| record.boot == self.boot))
    }

    fn write(&self, device: &Device, timeout_s: u32) -> io::Result<()> {
        let record = Record { device: device.clone(), timeout_s, boot: self.boot.clone() };
        let unfinished = self.file.with_extension("new");
        fs::write(&unfinished, serde_json::to_vec(&record)?)?;
        fs::rename(&unfinished, &self.file)
    }

    fn remove(&self) {
        if let Err(error) = fs::remove_file(&self.file)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(file = %self.file.display(), %error, "the record of a watchdog that was disarmed stays");
        }
    }

    /// Arms a watchdog, with `timeout_s` seconds or more if it knows no shorter time.
    ///
    /// # Errors
    /// Why it cannot be used, a clause; then it is not armed.
    pub fn arm(&self, device: Device, timeout_s: u32) -> Result<Armed, String> {
        let path = &device.path;
        self.write(&device, timeout_s).map_err(|error| format!("{}: {error}", self.file.display()))?;
        let file = match open(path) {
            Ok(file) => file,
            Err(error) => {
                self.remove();
                return Err(match error.raw_os_error() {
                    Some(libc::EBUSY) => format!("{path} is in use by another process"),
                    _ => format!("{path} cannot be opened: {error}"),
                });
            }
        };
        let mut armed = Armed { device, timeout_s, file };
        let unfit = match armed.suits() {
            Ok(()) => match self.retime(&mut armed, timeout_s) {
                Ok(()) => return Ok(armed),
                Err(unfit) => unfit,
            },
            Err(unfit) => unfit,
        };
        match self.disarm(armed) {
            Ok(()) => Err(unfit),
            Err((armed, error)) => {
                // Feeding it is what is left.
                tracing::error!(device = armed.device.path, %error, %unfit, "an armed watchdog can neither be used nor disarmed");
                Ok(armed)
            }
        }
    }

    /// Sets an armed watchdog to at least `timeout_s` seconds, and feeds it.
    ///
    /// # Errors
    /// Why it cannot be used, a clause.
    pub fn retime(&self, armed: &mut Armed, timeout_s: u32) -> Result<(), String> {
        let path = &armed.device.path;
        let set = watchdog_set_timeout(&armed.file, timeout_s)
            .map_err(|error| format!("{path} cannot be set to {timeout_s} s: {error}"))?;
        if set < timeout_s {
            return Err(format!("{path} waits for {set} s at most, and {timeout_s} s are needed"));
        }
        armed.feed().map_err(|error| format!("{path} cannot be fed: {error}"))?;
        armed.timeout_s = set;
        // What the record says of the time is for people only.
        let _ = self.write(&armed.device, set);
        Ok(())
    }

    /// Disarms a watchdog.
    ///
    /// # Errors
    /// It could not be told; it stays armed.
    pub fn disarm(&self, mut armed: Armed) -> Result<(), (Armed, io::Error)> {
        match armed.file.write_all(MAGIC) {
            Ok(()) => {
                drop(armed);
                self.remove();
                Ok(())
            }
            Err(error) => Err((armed, error)),
        }
    }

    /// Disarms what an earlier keeper left armed. Only when everything that it ran is
    /// known to be dead.
    ///
    /// # Errors
    /// It cannot be opened or told.
    pub fn take_over(&self, record: Record) -> io::Result<()> {
        let file = open(&record.device.path)?;
        let armed = Armed { device: record.device, timeout_s: record.timeout_s, file };
        self.disarm(armed).map_err(|(_, error)| error)
    }
}

fn open(path: &str) -> io::Result<File> {
    fs::OpenOptions::new().write(true).open(path)
}

/// A watchdog that is armed. Dropped, it stays armed and nobody feeds it.
pub struct Armed {
    /// Which.
    pub device: Device,
    /// Its time, in seconds.
    pub timeout_s: u32,
    file: File,
}

impl Armed {
    fn suits(&self) -> Result<(), String> {
        let path = &self.device.path;
        let support = watchdog_support(&self.file).map_err(|error| format!("{path} is no watchdog: {error}"))?;
        if support.options & NEEDED != NEEDED {
            return Err(format!(
                "{path} cannot be set, fed and disarmed as is needed (its abilities are {:#x})",
                support.options
            ));
        }
        Ok(())
    }

    /// Feeds it.
    pub fn feed(&self) -> io::Result<()> {
        watchdog_feed(&self.file)
    }
}
