//! Packs the guest: `guest-image MODULES INIT VMLINUZ OUT` writes `OUT/initrd.cpio` and, when the
//! kernel can be unpacked, `OUT/vmlinux`.
//!
//! A packer of our own because a fresh Debian has no `cpio`, no `depmod` and no `lz4`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::thread;

/// The stages in which PID 1 loads modules, with what each needs. Dependencies are added.
const STAGES: [(&str, &[&str]); 3] =
    [("net", &["virtio_pci", "virtio_net"]), ("disk", &["virtio_blk"]), ("power", &["button", "evdev"])];
/// No Debian kernel is near this; a damaged length must not make us ask for more memory.
const MAX_KERNEL_BYTES: usize = 256 << 20;

#[derive(Debug, thiserror::Error)]
enum PackError {
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: std::io::Error },
    #[error("the kernel package has no module {0}, and it is not built in either")]
    NoModule(String),
    #[error("{tool} failed or is not installed: install it, then build again")]
    Tool { tool: &'static str },
    #[error("the kernel image is not one that can be unpacked: {0}")]
    Kernel(&'static str),
}

fn main() -> ExitCode {
    let arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [modules, init, vmlinuz, out] = arguments.as_slice() else {
        eprintln!("usage: guest-image MODULES INIT VMLINUZ OUT");
        return ExitCode::from(2);
    };
    match pack(modules, init).and_then(|archive| write(&out.join("initrd.cpio"), &archive)) {
        Ok(()) => {}
        Err(error) => {
            eprintln!("guest-image: {error}");
            return ExitCode::FAILURE;
        }
    }
    // The unpacked kernel only boots faster: without it the guest is whole.
    if let Err(error) = read(vmlinuz).and_then(|image| write(&out.join("vmlinux"), &unpack_kernel(&image)?)) {
        eprintln!("guest-image: no vmlinux: {error}");
    }
    ExitCode::SUCCESS
}

fn read(path: &Path) -> Result<Vec<u8>, PackError> {
    fs::read(path).map_err(|source| PackError::Io { path: path.to_owned(), source })
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), PackError> {
    fs::write(path, bytes).map_err(|source| PackError::Io { path: path.to_owned(), source })
}

/// The initramfs: directories, the console's device node, the init, and the modules of each stage
/// numbered in the order in which they can be loaded.
fn pack(modules: &Path, init: &Path) -> Result<Vec<u8>, PackError> {
    let files = module_files(modules)?;
    let builtin = read(&modules.join("modules.builtin")).unwrap_or_default();
    let builtin: BTreeSet<String> =
        String::from_utf8_lossy(&builtin).lines().map(|line| module_name(Path::new(line))).collect();
    let mut archive = Archive::default();
    for directory in ["dev", "proc", "sys", "modules"] {
        archive.directory(directory);
    }
    archive.character_device("dev/console", 5, 1);
    archive.file("init", 0o755, &read(init)?);
    let mut packed = builtin;
    for (stage, wanted) in STAGES {
        archive.directory(&format!("modules/{stage}"));
        let mut ordered = Vec::new();
        for name in wanted {
            collect(name, &files, &mut packed, &mut ordered)?;
        }
        for (index, (name, content)) in ordered.iter().enumerate() {
            archive.file(&format!("modules/{stage}/{index:02}-{name}.ko"), 0o644, content);
        }
    }
    Ok(archive.finish())
}

/// Appends a module behind those that it depends on. `packed` also keeps a cycle from looping.
fn collect(
    name: &str,
    files: &BTreeMap<String, PathBuf>,
    packed: &mut BTreeSet<String>,
    ordered: &mut Vec<(String, Vec<u8>)>,
) -> Result<(), PackError> {
    if !packed.insert(name.to_owned()) {
        return Ok(());
    }
    let path = files.get(name).ok_or_else(|| PackError::NoModule(name.to_owned()))?;
    let content = match path.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => decompress("xz", &read(path)?)?,
        Some("zst") => decompress("zstd", &read(path)?)?,
        _ => read(path)?,
    };
    let content = unsigned(content);
    for dependency in dependencies(&content) {
        collect(&dependency, files, packed, ordered)?;
    }
    ordered.push((name.to_owned(), content));
    Ok(())
}

/// Cuts off a module's signature. Checking one takes an emulated CPU some 20 ms per module, and the
/// kernel takes unsigned modules unless it is locked down, which needs secure boot. Format: Linux,
/// include/linux/module_signature.h.
fn unsigned(mut module: Vec<u8>) -> Vec<u8> {
    const MARKER: &[u8] = b"~Module signature appended~\n";
    const TRAILER_BYTES: usize = 12;
    let length = module.strip_suffix(MARKER).and_then(|signed| {
        let (signed, signature_bytes) = signed.split_last_chunk::<4>()?;
        let tail = u32::from_be_bytes(*signature_bytes) as usize + TRAILER_BYTES - 4;
        signed.len().checked_sub(tail)
    });
    module.truncate(length.unwrap_or(module.len()));
    module
}

/// What a module's `.modinfo` section says after `depends=`.
fn dependencies(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let list: Vec<u8> = module[at + KEY.len()..].iter().copied().take_while(|byte| *byte != 0).collect();
    let list = String::from_utf8_lossy(&list).replace('-', "_");
    list.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

fn module_files(root: &Path) -> Result<BTreeMap<String, PathBuf>, PackError> {
    let mut files = BTreeMap::new();
    let mut directories = vec![root.join("kernel")];
    while let Some(directory) = directories.pop() {
        let failed = |source| PackError::Io { path: directory.clone(), source };
        for entry in fs::read_dir(&directory).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let path = entry.path();
            if entry.file_type().map_err(failed)?.is_dir() {
                directories.push(path);
            } else if entry.file_name().to_string_lossy().contains(".ko") {
                files.insert(module_name(&path), path);
            }
        }
    }
    Ok(files)
}

/// `virtio-rng.ko.xz` is the file of the module `virtio_rng`.
fn module_name(path: &Path) -> String {
    let file = path.file_name().unwrap_or_default().to_string_lossy();
    file.split(".ko").next().unwrap_or_default().replace('-', "_")
}

fn decompress(tool: &'static str, input: &[u8]) -> Result<Vec<u8>, PackError> {
    let failed = |_| PackError::Tool { tool };
    let mut child = Command::new(tool)
        .args(["-d", "-c", "-q"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(failed)?;
    let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
    let mut output = Vec::new();
    thread::scope(|scope| {
        // A broken pipe is no failure: xz stops reading at the end of its stream, and the kernel
        // image carries four bytes more.
        scope.spawn(move || stdin.map(|mut stdin| stdin.write_all(input)));
        stdout.map_or(Ok(0), |mut stdout| stdout.read_to_end(&mut output))
    })
    .map_err(failed)?;
    child.wait().map_err(failed)?;
    if output.is_empty() { Err(PackError::Tool { tool }) } else { Ok(output) }
}

/// Takes the ELF kernel out of a bzImage. Offsets: Linux, Documentation/arch/x86/boot.rst.
fn unpack_kernel(image: &[u8]) -> Result<Vec<u8>, PackError> {
    let word = |at: usize| {
        image.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map(u32::from_le_bytes).map(|word| word as usize)
    };
    let short = PackError::Kernel("it is too short");
    let (Some(magic), Some(offset), Some(length)) = (word(0x202), word(0x248), word(0x24c)) else {
        return Err(short);
    };
    if magic != u32::from_le_bytes(*b"HdrS") as usize {
        return Err(PackError::Kernel("it has no boot header"));
    }
    let sectors = match image[0x1f1] {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let start = (sectors + 1) * 512 + offset;
    let payload = start.checked_add(length).and_then(|end| image.get(start..end)).ok_or(short)?;
    let kernel = match payload {
        [0x02, 0x21, 0x4c, 0x18, blocks @ ..] => unpack_lz4(blocks)?,
        [0xfd, b'7', b'z', b'X', b'Z', ..] => decompress("xz", payload)?,
        [0x28, 0xb5, 0x2f, 0xfd, ..] => decompress("zstd", payload)?,
        [0x1f, 0x8b, ..] => decompress("gzip", payload)?,
        _ => return Err(PackError::Kernel("its compression is not known")),
    };
    if kernel.starts_with(b"\x7fELF") { Ok(kernel) } else { Err(PackError::Kernel("no ELF file came out")) }
}

/// LZ4's legacy frame: blocks, each behind its compressed length. Source of both formats: lz4,
/// doc/lz4_Frame_format.md ("Legacy frame") and doc/lz4_Block_format.md.
fn unpack_lz4(mut rest: &[u8]) -> Result<Vec<u8>, PackError> {
    let mut output = Vec::new();
    // The kernel's build appends the unpacked size behind the last block: four bytes, no block.
    while let Some((length, behind)) = rest.split_first_chunk::<4>()
        && !behind.is_empty()
    {
        let length = u32::from_le_bytes(*length) as usize;
        let (block, behind) = behind.split_at_checked(length).ok_or(PackError::Kernel("its LZ4 stream is cut off"))?;
        unpack_lz4_block(block, &mut output).ok_or(PackError::Kernel("its LZ4 stream is damaged"))?;
        rest = behind;
    }
    Ok(output)
}

fn unpack_lz4_block(mut block: &[u8], output: &mut Vec<u8>) -> Option<()> {
    fn length(nibble: u8, block: &mut &[u8]) -> Option<usize> {
        let mut length = usize::from(nibble);
        if nibble == 15 {
            loop {
                let (byte, rest) = block.split_first()?;
                *block = rest;
                length += usize::from(*byte);
                if *byte != 255 {
                    break;
                }
            }
        }
        Some(length)
    }
    while let Some((token, rest)) = block.split_first() {
        block = rest;
        let literals = length(token >> 4, &mut block)?;
        output.extend_from_slice(block.get(..literals)?);
        block = &block[literals..];
        if block.is_empty() {
            break;
        }
        let (distance, rest) = block.split_first_chunk::<2>()?;
        block = rest;
        let matched = length(token & 15, &mut block)? + 4;
        let start = output.len().checked_sub(usize::from(u16::from_le_bytes(*distance)))?;
        if start == output.len() || output.len() + matched > MAX_KERNEL_BYTES {
            return None;
        }
        // Byte by byte: a match may overlap what it produces.
        for at in start..start + matched {
            output.push(output[at]);
        }
    }
    Some(())
}

/// A cpio archive in the "newc" format (Linux, Documentation/driver-api/early-userspace/buffer-format.rst).
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

impl Archive {
    fn directory(&mut self, name: &str) {
        self.entry(name, 0o040_755, (0, 0), &[]);
    }

    fn character_device(&mut self, name: &str, major: u32, minor: u32) {
        self.entry(name, 0o020_600, (major, minor), &[]);
    }

    fn file(&mut self, name: &str, permissions: u32, content: &[u8]) {
        self.entry(name, 0o100_000 | permissions, (0, 0), content);
    }

    fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, (major, minor): (u32, u32), content: &[u8]) {
        self.inode += 1;
        let mut header = "070701".to_owned();
        let (size, name_size) = (content.len() as u32, name.len() as u32 + 1);
        // inode, mode, uid, gid, links, mtime (0: the same input gives the same archive), size,
        // device, special device, name size, checksum (unused).
        for field in [self.inode, mode, 0, 0, 1, 0, size, 0, 0, major, minor, name_size, 0] {
            // Writing to a String cannot fail.
            let _ = write!(header, "{field:08x}");
        }
        self.bytes.extend_from_slice(header.as_bytes());
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lz4_literals_overlaps_and_long_lengths_unpack() {
        let mut output = Vec::new();
        // "ab", then 5 bytes from 2 back, then "z".
        assert_eq!(unpack_lz4_block(b"\x21ab\x02\0\x10z", &mut output), Some(()));
        assert_eq!(output, b"abababaz");
        // One literal, a match of 15 + 255 + 1 + 4 bytes from 1 back, one literal.
        let mut output = Vec::new();
        assert_eq!(unpack_lz4_block(b"\x1fx\x01\0\xff\x01\x10y", &mut output), Some(()));
        assert_eq!((output.len(), output[275], output[276]), (277, b'x', b'y'));
    }

    #[test]
    fn damaged_lz4_is_refused() {
        for block in [&b"\x21a"[..], b"\x10a\x02\0", b"\x10a\0\0", b"\xf0\xff"] {
            assert_eq!(unpack_lz4_block(block, &mut Vec::new()), None, "{block:?}");
        }
        assert!(unpack_lz4(b"\xff\xff\0\0abc").is_err());
        assert!(unpack_kernel(b"not a kernel").is_err());
    }

    #[test]
    fn dependencies_come_from_modinfo() {
        assert_eq!(dependencies(b"\0license=GPL\0depends=virtio,virtio-ring\0x"), ["virtio", "virtio_ring"]);
        assert_eq!(dependencies(b"\0depends=\0"), Vec::<String>::new());
        assert_eq!(module_name(Path::new("kernel/a/virtio-rng.ko.xz")), "virtio_rng");
    }

    #[test]
    fn signatures_are_cut_off() {
        let signed =
            |length: &[u8]| [b"ELFcode", &b"signature"[..], &[0; 8], length, b"~Module signature appended~\n"].concat();
        assert_eq!(unsigned(signed(&[0, 0, 0, 9])), b"ELFcode");
        let damaged = signed(&[0xff; 4]);
        assert_eq!(unsigned(damaged.clone()), damaged);
        assert_eq!(unsigned(b"ELFcode".to_vec()), b"ELFcode");
    }

    #[test]
    fn archive_is_newc() {
        let mut archive = Archive::default();
        archive.file("init", 0o755, b"hello");
        let bytes = archive.finish();
        assert!(bytes.starts_with(b"070701000000010000"));
        assert_eq!(&bytes[110..115], b"init\0");
        assert_eq!(&bytes[116..124], b"hello\0\0\0");
        assert_eq!(bytes.len() % 4, 0);
    }
}
