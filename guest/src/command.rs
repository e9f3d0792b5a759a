//! The text commands of the TCP service and of the console.

/// One line of the list that `help` prints.
pub const HELP: &str = "ping N | write | status | echo TEXT | dirty MB_PER_S MB | stop-dirty | fill MB | \
                        writer on RATE | writer off | idle | poweroff | reboot | crash | help";

/// A line that could not be understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cannot understand {line:?}: say one of {HELP}")]
pub struct CommandError {
    line: String,
}

/// A command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Answer with the number.
    Ping(u64),
    /// Append a record.
    Write,
    /// Say how the guest is.
    Status,
    /// Answer with the text.
    Echo(String),
    /// Dirty memory: MB/s, MB.
    Dirty(u32, u32),
    /// End dirtying.
    StopDirty,
    /// Hold so many MB of incompressible memory.
    Fill(u32),
    /// Write so many records per second without being asked; `None`: stop.
    Writer(Option<u32>),
    /// End all load.
    Idle,
    /// End the machine.
    Power(crate::sys::Power),
    /// List the commands.
    Help,
}

impl Command {
    /// Reads a line.
    ///
    /// # Errors
    /// [`CommandError`] when it is no command.
    pub fn parse(line: &str) -> Result<Self, CommandError> {
        use crate::sys::Power;
        let unknown = || CommandError { line: line.trim().to_owned() };
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let number = |word: &str| word.parse::<u32>().map_err(|_| unknown());
        Ok(match words.as_slice() {
            ["ping", n] => Command::Ping(n.parse().map_err(|_| unknown())?),
            ["write"] => Command::Write,
            ["status"] => Command::Status,
            ["echo", text @ ..] => Command::Echo(text.join(" ")),
            ["dirty", rate, size] => Command::Dirty(number(rate)?, number(size)?),
            ["stop-dirty"] => Command::StopDirty,
            ["fill", size] => Command::Fill(number(size)?),
            ["writer", "on", rate] => Command::Writer(Some(number(rate)?)),
            ["writer", "off"] => Command::Writer(None),
            ["idle"] => Command::Idle,
            ["poweroff"] => Command::Power(Power::Off),
            ["reboot"] => Command::Power(Power::Reboot),
            ["crash"] => Command::Power(Power::Crash),
            ["help"] => Command::Help,
            _ => return Err(unknown()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_understood() {
        assert_eq!(Command::parse("ping 7\n"), Ok(Command::Ping(7)));
        assert_eq!(Command::parse(" writer on 50 "), Ok(Command::Writer(Some(50))));
        assert_eq!(Command::parse("echo a  b"), Ok(Command::Echo("a b".to_owned())));
        assert_eq!(Command::parse("dirty 100 256"), Ok(Command::Dirty(100, 256)));
        for line in ["", "ping", "ping x", "dirty 1", "writer", "fill -1", "poweroff now"] {
            let error = Command::parse(line).unwrap_err();
            assert!(error.to_string().contains("say one of ping N"), "{error}");
        }
    }
}
