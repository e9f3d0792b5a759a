//! What a program can bring in order itself.

use anyhow::Result;

use crate::step::Step;

/// Tests that compare a committed file write it anew when this variable is set.
const RENEW: &str = "HOLDFAST_RENEW";

/// Formats the sources and renews the committed files that are generated from them.
///
/// The log's golden file is not among them: it is the format that running
/// clusters have on their disks.
pub fn run() -> Result<bool> {
    let steps = [
        Step::cargo("format", &["fmt", "--all"]),
        Step::cargo("the crates' dependencies", &["test", "--quiet", "-p", "xtask", "--test", "structure"]),
        Step::cargo("the OpenAPI document", &["test", "--quiet", "-p", "holdfast", "--bins", "openapi_document"]),
        Step::cargo("QEMU's command lines", &["test", "--quiet", "-p", "holdfast-qemu", "--test", "command_line"])
            .env("INSTA_UPDATE", "always"),
    ];
    let mut good = true;
    for step in steps {
        good &= step.env(RENEW, "1").run()?.passed();
    }
    println!("\nlook at what has changed: git diff");
    Ok(good)
}
