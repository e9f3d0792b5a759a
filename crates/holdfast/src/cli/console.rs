//! A VM's serial console on this terminal.

use std::io::{IsTerminal, Write};

use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::client::Client;
use super::{CliError, Done};
use crate::agent::CONSOLE_PROTOCOL;

/// Ctrl-], which leaves, as telnet and virsh have it.
const LEAVE: u8 = 0x1d;

/// Connects this terminal to a VM's console until Ctrl-] or the VM's end.
pub async fn console(client: &Client, path: &str, name: &str) -> Done {
    let mut console = client.upgrade(path, CONSOLE_PROTOCOL).await?;
    eprintln!("Connected to the console of {name}. Ctrl-] leaves.");
    let raw = Raw::enter()?;
    let mut keys = tokio::io::stdin();
    let mut screen = tokio::io::stdout();
    let (mut typed, mut shown) = ([0; 256], [0; 8192]);
    let mut typing = true;
    let ended = loop {
        tokio::select! {
            read = keys.read(&mut typed), if typing => match read? {
                // What is typed may come from a file: go on showing when it ends.
                0 => typing = false,
                read => {
                    let (send, leave) = cut(&typed[..read]);
                    console.write_all(send).await?;
                    console.flush().await?;
                    if leave {
                        break "left";
                    }
                }
            },
            read = console.read(&mut shown) => match read {
                Ok(0) | Err(_) => break "ended: the VM is off, or was moved or restarted",
                Ok(read) => {
                    screen.write_all(&shown[..read]).await?;
                    screen.flush().await?;
                }
            },
        }
    };
    drop(raw);
    eprintln!("\nThe console of {name} {ended}.");
    // A thread is still blocked in reading the terminal; the runtime would wait
    // for one more key when it is shut down.
    std::io::stdout().flush()?;
    std::process::exit(0)
}

/// What is typed before the key that leaves, and whether that was there.
fn cut(typed: &[u8]) -> (&[u8], bool) {
    match typed.iter().position(|key| *key == LEAVE) {
        Some(at) => (&typed[..at], true),
        None => (typed, false),
    }
}

/// Every key goes to the guest while this lives.
struct Raw(Option<Termios>);

impl Raw {
    fn enter() -> Result<Raw, CliError> {
        let input = std::io::stdin();
        if !input.is_terminal() {
            return Ok(Raw(None));
        }
        let failed = |errno: nix::Error| CliError::Local(format!("the terminal cannot be set up: {errno}"));
        let before = tcgetattr(&input).map_err(failed)?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(&input, SetArg::TCSANOW, &raw).map_err(failed)?;
        Ok(Raw(Some(before)))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            let _ = tcsetattr(std::io::stdin(), SetArg::TCSANOW, before);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_after_the_leaving_key_reaches_the_guest() {
        assert_eq!(cut(b"ls\r"), (&b"ls\r"[..], false));
        assert_eq!(cut(b"ls\x1drm"), (&b"ls"[..], true));
    }
}
