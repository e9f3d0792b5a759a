//! Does KVM really run guests here?
//!
//! A `/dev/kvm` that can be opened proves little: there are hosts (nested ones,
//! mostly) on which the firmware starts and no kernel ever does. So a guest is
//! run, whose boot sector does what every 64-bit kernel does first: it builds
//! page tables, enters long mode, takes an exception through its own interrupt
//! table, and then tells so through QEMU's `isa-debug-exit` device.
//!
//! It proves: firmware, disk, mode switches, paging, the delivery of an
//! exception in long mode. It does not prove: several processors, interrupts of
//! devices and timers, the many instructions that only a real kernel uses.

use std::io::Write;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::Command;
use tokio::time::timeout;

/// How long the guest may take: about 100 ms when all is well.
const DEADLINE: Duration = Duration::from_secs(5);

/// What the guest writes to `isa-debug-exit`, and what QEMU makes of it.
const WORD: u8 = 0x2a;
const EXIT_CODE: i32 = ((WORD as i32) << 1) | 1;

/// SeaBIOS reads no disk that is smaller than a cylinder.
const DISK_BYTES: u64 = 1 << 20;

/// The boot sector, loaded at 0x7c00 in real mode.
///
/// Page tables are at 0x1000 (PML4), 0x2000 (PDPT) and 0x3000 (one 2 MiB page
/// that maps the first 2 MiB onto themselves).
#[rustfmt::skip]
const BOOT_CODE: [u8; 0x78] = [
    0xfa,                               // cli
    0x31, 0xc0,                         // xor  ax, ax
    0x8e, 0xd8,                         // mov  ds, ax
    0x8e, 0xc0,                         // mov  es, ax
    0x8e, 0xd0,                         // mov  ss, ax
    0xbc, 0x00, 0x7c,                   // mov  sp, 0x7c00
    0xbf, 0x00, 0x10,                   // mov  di, 0x1000
    0x31, 0xc0,                         // xor  ax, ax
    0xb9, 0x00, 0x18,                   // mov  cx, 0x1800
    0xfc,                               // cld
    0xf3, 0xab,                         // rep  stosw
    0xc7, 0x06, 0x00, 0x10, 0x03, 0x20, // mov  word [0x1000], 0x2003
    0xc7, 0x06, 0x00, 0x20, 0x03, 0x30, // mov  word [0x2000], 0x3003
    0xc7, 0x06, 0x00, 0x30, 0x83, 0x00, // mov  word [0x3000], 0x0083
    0x66, 0xb8, 0x20, 0x00, 0x00, 0x00, // mov  eax, 0x20 (PAE)
    0x0f, 0x22, 0xe0,                   // mov  cr4, eax
    0x66, 0xb8, 0x00, 0x10, 0x00, 0x00, // mov  eax, 0x1000
    0x0f, 0x22, 0xd8,                   // mov  cr3, eax
    0x66, 0xb9, 0x80, 0x00, 0x00, 0xc0, // mov  ecx, 0xc0000080 (EFER)
    0x0f, 0x32,                         // rdmsr
    0x0d, 0x00, 0x01,                   // or   ax, 0x100 (LME)
    0x0f, 0x30,                         // wrmsr
    0x0f, 0x01, 0x16, 0x90, 0x7c,       // lgdt [0x7c90]
    0x66, 0xb8, 0x01, 0x00, 0x00, 0x80, // mov  eax, 0x80000001 (PG | PE)
    0x0f, 0x22, 0xc0,                   // mov  cr0, eax
    0xea, 0x5b, 0x7c, 0x08, 0x00,       // jmp  0x08:0x7c5b
    // 64 bit from here on
    0x66, 0xb8, 0x10, 0x00,             // mov  ax, 0x10
    0x8e, 0xd8,                         // mov  ds, ax
    0x8e, 0xd0,                         // mov  ss, ax
    0xbc, 0x00, 0x7c, 0x00, 0x00,       // mov  esp, 0x7c00
    0x0f, 0x01, 0x1d, 0x27, 0x00, 0x00, 0x00, // lidt [rip + 0x27] (0x7c96)
    0xcc,                               // int3, which goes to:
    0xb0, WORD,                         // mov  al, WORD
    0xe6, 0xf4,                         // out  0xf4, al
    0xf4,                               // hlt
    0xeb, 0xfd,                         // jmp  to the hlt
    0x90,
];

/// Where `int3` goes.
const BREAKPOINT: u16 = 0x7c70;

fn boot_sector() -> [u8; 512] {
    let mut sector = [0; 512];
    let mut put = |at: usize, bytes: &[u8]| sector[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &BOOT_CODE);
    // The segments, from 0x7c78: none, 64-bit code, data.
    put(0x80, &0x0020_9a00_0000_0000_u64.to_le_bytes());
    put(0x88, &0x0000_9200_0000_0000_u64.to_le_bytes());
    // What lgdt loads: limit and base.
    put(0x90, &23_u16.to_le_bytes());
    put(0x92, &0x7c78_u32.to_le_bytes());
    // What lidt loads; the table begins at 0x7ca0 with sixteen bytes a gate.
    put(0x96, &63_u16.to_le_bytes());
    put(0x98, &0x7ca0_u64.to_le_bytes());
    // Gate 3: offset, selector, present 64-bit interrupt gate.
    put(0xd0, &BREAKPOINT.to_le_bytes());
    put(0xd2, &8_u16.to_le_bytes());
    put(0xd4, &0x8e00_u16.to_le_bytes());
    put(0x1fe, &[0x55, 0xaa]);
    sector
}

/// Runs the guest; the reason if it does not come to its end.
pub(crate) async fn probe(qemu: &Path) -> Result<(), String> {
    std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .map_err(|error| format!("/dev/kvm cannot be opened: {error}"))?;
    run(qemu, "kvm", "host,migratable=on").await
}

async fn run(qemu: &Path, accelerator: &str, cpu: &str) -> Result<(), String> {
    let disk = tempfile::Builder::new()
        .prefix("holdfast-kvm-probe-")
        .tempfile()
        .and_then(|mut file| {
            file.write_all(&boot_sector())?;
            file.as_file().set_len(DISK_BYTES)?;
            Ok(file)
        })
        .map_err(|error| format!("no disk could be made for the trial guest: {error}"))?;
    let node = serde_json::json!({
        "driver": "raw",
        "node-name": "boot",
        "read-only": true,
        "file": {"driver": "file", "filename": disk.path()},
    });
    let mut child = Command::new(qemu)
        .args(["-nodefaults", "-no-user-config", "-display", "none"])
        .args(["-no-reboot", "-m", "32", "-machine", "q35,usb=off,sata=off"])
        .args(["-accel", accelerator, "-cpu", cpu])
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=0x04"])
        .args(["-blockdev", &node.to_string()])
        .args(["-device", "virtio-blk-pci,drive=boot,bootindex=0"])
        .args(["-qmp", "stdio"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| format!("{} cannot be run: {error}", qemu.display()))?;
    let (Some(mut commands), Some(answers)) = (child.stdin.take(), child.stdout.take()) else {
        return Err("the trial guest's monitor is missing".into());
    };
    let outcome = timeout(DEADLINE, async {
        // Events come only after this. A QEMU that has ended already cannot
        // take it, and its exit status says why.
        let _ = commands.write_all(b"{\"execute\":\"qmp_capabilities\"}\n").await;
        let mut lines = BufReader::new(answers).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            let message: serde_json::Value = serde_json::from_str(&line).unwrap_or_default();
            if message["event"] == "STOP" {
                // The processor is in a state that KVM cannot run.
                return None;
            }
        }
        child.wait().await.ok()
    })
    .await;
    // Dead before the disk is deleted; `kill` also reaps.
    let _ = child.kill().await;
    match outcome {
        Ok(Some(status)) if status.code() == Some(EXIT_CODE) => Ok(()),
        Ok(Some(status)) => Err(format!("QEMU cannot use KVM ({status})")),
        Ok(None) => Err("KVM could not run a 64-bit guest".into()),
        Err(_) => Err(format!("a small guest did not run under KVM within {} s", DEADLINE.as_secs())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The trial guest itself is right: it comes to its end where the processor
    /// is a correct one.
    #[tokio::test]
    async fn the_trial_guest_runs_in_software() {
        let qemu = std::env::var_os("HOLDFAST_QEMU").unwrap_or("qemu-system-x86_64".into());
        run(Path::new(&qemu), "tcg", "max,la57=off").await.expect("the trial guest");
    }
}
