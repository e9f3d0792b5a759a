//! Documents made from the command line's definition and the API's.

use std::path::Path;

use clap::CommandFactory;
use clap_complete::Shell;

use super::args::Cli;
use super::{CliError, Done, output};

/// Prints the completion script for a shell.
pub fn completions(shell: Shell) -> Done {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "holdfast", &mut script);
    output::line(String::from_utf8_lossy(&script).trim_end())
}

/// Writes a man page for every command.
pub fn man(dir: &Path) -> Done {
    let failed = |error: std::io::Error| CliError::Local(format!("{} cannot be written: {error}", dir.display()));
    std::fs::create_dir_all(dir).map_err(failed)?;
    clap_mangen::generate_to(Cli::command(), dir).map_err(failed)
}

/// Prints the OpenAPI document.
pub fn openapi() -> Done {
    let text = crate::http::openapi().map_err(|error| CliError::Local(error.to_string()))?;
    output::line(text.trim_end())
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_command_has_a_man_page() {
        let dir = tempfile::tempdir().unwrap();
        super::man(dir.path()).unwrap();
        let page = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
        assert!(page("holdfast-vm-create.1").contains("priority"));
        assert!(page("holdfast.1").contains("Failover clusters"));
        assert!(!dir.path().join("holdfast-lab-init.1").exists());
    }
}
