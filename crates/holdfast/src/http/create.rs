//! From a definition to a VM: what is missing is chosen, what it names is
//! looked at, and what cannot be is refused before anything is made.

use std::collections::BTreeSet;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use holdfast_api as api;
use holdfast_core::*;
use holdfast_qemu::{QemuError, QemuImg};
use ring::digest::{Context, SHA256};
use uuid::Uuid;

use super::error::ApiError;
use crate::agent::Agent;
use crate::identity::hex;

/// How long `qemu-img` may take to look at an image.
const INSPECT_WITHIN: Duration = Duration::from_secs(20);
/// Sizes of disks are multiples of this, in bytes.
const BLOCK_BYTES: u64 = 512;
/// The largest kernel or initial ramdisk, in bytes.
const LARGEST_BOOT_FILE: u64 = 2 << 30;

/// Where a file comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Source {
    /// A file of this node.
    Here(PathBuf),
    /// A file on a volume, relative to it.
    OnVolume { volume: String, file: String },
}

/// A disk's image, as looked at.
struct Filling {
    path: String,
    virtual_bytes: u64,
}

/// A kernel or ramdisk that has to be copied to a volume.
#[derive(Debug, PartialEq, Eq)]
struct Copying {
    from: PathBuf,
    to: PathBuf,
}

/// A kernel and what has to be copied for it.
struct Boot {
    spec: DirectBoot,
    copies: Vec<Copying>,
}

/// The command that creates the VM of `request` with its disks made on this
/// node. A kernel that only this node has is on its volume afterwards.
///
/// # Errors
/// An [`ApiError`] that says what cannot be and why.
pub async fn command(agent: &Agent, request: api::CreateVm) -> Result<Command, ApiError> {
    let state = agent.state();
    let me = agent.me().ok_or_else(|| agent.outside())?;
    let wanted = request.vm;
    if state.vm_named(&wanted.name).is_some() {
        return Err(Refusal::Duplicate { what: "VM".into(), name: wanted.name }.into());
    }
    for disk in &wanted.disks {
        known_volume(&state, &disk.volume)?;
    }
    let mut images = Vec::new();
    let mut sizes = Vec::new();
    for (index, disk) in wanted.disks.iter().enumerate() {
        let filling = match &disk.image {
            Some(image) => Some(look_at_image(agent, &state, image).await?),
            None => None,
        };
        let size = match &disk.file {
            Some(file) => size_of_file(&state, index, disk, file)?,
            None => {
                let block = if state.luns.contains_key(&disk.volume) { LUN_BLOCK_BYTES } else { BLOCK_BYTES };
                disk_size(index, disk.size, filling.as_ref().map(|f| f.virtual_bytes), block)?
            }
        };
        if !state.luns.contains_key(&disk.volume) {
            let path = agent.volume_path(&disk.volume, "");
            let allocate = disk.allocate;
            let room = blocking(move || Ok(room_at(&path, allocate))).await?;
            fits_volume(index, size, disk, room)?;
        }
        sizes.push(size);
        images.push(filling.map(|filling| filling.path));
    }
    let boot = match &wanted.boot {
        Some(boot) => Some(look_at_boot(agent, &state, &wanted, boot).await?),
        None => None,
    };
    let machine = machine(&state, wanted.machine.as_deref())?;
    let id = VmId(Uuid::new_v4());
    let (boot, copies) = boot.map_or((None, Vec::new()), |boot| (Some(boot.spec), boot.copies));
    let spec = compose(&state, id, &wanted, &sizes, machine, boot, draw_mac)?;
    let command =
        Command::CreateVm { id, name: wanted.name, spec, node: me, sources: Sources { images, start: request.start } };
    rehearse(&state, command.clone())?;
    for copying in copies {
        blocking(move || {
            copy(&copying).map_err(|error| {
                let (from, to) = (copying.from.display(), copying.to.display());
                ApiError::new("no_space", format!("{from} cannot be copied to {to}: {error}"))
            })
        })
        .await?;
    }
    Ok(command)
}

/// Tries a command on a copy of the state, so that nothing is begun for one that
/// would be refused.
///
/// # Errors
/// Why it does not.
pub fn rehearse(state: &ClusterState, command: Command) -> Result<(), ApiError> {
    let proposal = Proposal { id: RequestId(Uuid::new_v4()), at_ms: 0, by: String::new(), command };
    match state.clone().apply(&proposal) {
        Reply::Refused(refusal) => Err(refusal.into()),
        _ => Ok(()),
    }
}

/// The VM's hardware, with everything chosen that its definition leaves open.
fn compose(
    state: &ClusterState,
    id: VmId,
    wanted: &api::VmDefinition,
    sizes: &[u64],
    machine: String,
    direct_boot: Option<DirectBoot>,
    mut draw_mac: impl FnMut() -> Mac,
) -> Result<VmSpec, ApiError> {
    let directory = Vm::directory(id, &wanted.name);
    let disks = wanted.disks.iter().zip(sizes).enumerate();
    let disks = disks.map(|(index, (disk, size_bytes))| {
        let format = match (disk.format, &disk.file) {
            (api::DiskFormat::Raw, _) | (_, Some(_)) => DiskFormat::Raw,
            (api::DiskFormat::Qcow2, None) => DiskFormat::Qcow2,
            (api::DiskFormat::Vhdx, None) => DiskFormat::Vhdx,
            (api::DiskFormat::Vhd, None) => DiskFormat::Vhd,
        };
        let new = || format!("{directory}/disk{index}.{}", format.extension());
        DiskSpec {
            volume: disk.volume.clone(),
            file: disk.file.clone().unwrap_or_else(new),
            size_bytes: *size_bytes,
            format,
            allocation: match disk.allocate {
                api::Allocation::Thin => Allocation::Thin,
                api::Allocation::Full => Allocation::Full,
            },
        }
    });
    let mut taken: BTreeSet<Mac> = state.vms.values().flat_map(|vm| vm.spec.nics.iter().map(|nic| nic.mac)).collect();
    let mut nics = Vec::new();
    for nic in &wanted.nics {
        let mac = match &nic.mac {
            Some(text) => text.parse().map_err(ApiError::invalid)?,
            None => loop {
                let mac = draw_mac();
                if !taken.contains(&mac) {
                    break mac;
                }
            },
        };
        if nics.iter().any(|other: &NicSpec| other.mac == mac) {
            return Err(ApiError::invalid(format!("two network adapters have the hardware address {mac}")));
        }
        taken.insert(mac);
        nics.push(NicSpec { switch: nic.switch.clone(), mac, vlan: nic.vlan });
    }
    Ok(VmSpec {
        cpus: wanted.cpus,
        memory_bytes: wanted.memory.0,
        machine,
        cpu_model: wanted.cpu_model.clone(),
        direct_boot,
        disks: disks.collect(),
        nics,
        priority: match wanted.priority {
            api::Priority::None => Priority::None,
            api::Priority::Low => Priority::Low,
            api::Priority::Medium => Priority::Medium,
            api::Priority::High => Priority::High,
        },
        stop_timeout_s: wanted.stop_timeout_s,
    })
}

/// An address under QEMU's own prefix, 52:54:00.
fn draw_mac() -> Mac {
    let random = Uuid::new_v4().into_bytes();
    Mac([0x52, 0x54, 0, random[0], random[1], random[2]])
}

/// The machine type: the one that was asked for when a node offers it, or else
/// the newest `pc-q35` that every node that is up offers.
fn machine(state: &ClusterState, wanted: Option<&str>) -> Result<String, ApiError> {
    if let Some(wanted) = wanted {
        // Nodes list versioned types only, so a bare `q35` is refused here too.
        if state.nodes.values().any(|node| node.offers(wanted)) {
            return Ok(wanted.into());
        }
        return Err(ApiError::invalid(format!(
            "no node has a QEMU with the versioned machine type {wanted:?}: `holdfast node show NAME` tells the newest one"
        )));
    }
    let mut able =
        state.nodes.values().filter(|node| node.is_up() && node.facts.qemu.is_some()).map(|node| &node.facts.machines);
    let Some(first) = able.next() else {
        return Err(ApiError::new("no_room", "no node that is up has a usable QEMU: install QEMU 7.2 or later"));
    };
    let others: Vec<_> = able.collect();
    first
        .iter()
        .filter(|machine| others.iter().all(|offered| offered.contains(machine)))
        .filter_map(|machine| Some((version(machine)?, machine)))
        .max()
        .map(|(_, machine)| machine.clone())
        .ok_or_else(|| {
            ApiError::new(
                "no_machine_type",
                "the QEMUs of the nodes that are up have no versioned pc-q35 machine type in common: bring them to similar versions, or name a machine type",
            )
        })
}

/// The version of a `pc-q35` machine type: `pc-q35-7.2` is (7, 2).
fn version(machine: &str) -> Option<(u32, u32)> {
    let (major, minor) = machine.strip_prefix("pc-q35-")?.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// A disk's size: what is asked for, or else its image's.
fn disk_size(index: usize, wanted: Option<api::Size>, image: Option<u64>, block: u64) -> Result<u64, ApiError> {
    let refuse = |text: String| Err(ApiError::invalid(format!("disk {index}: {text}")));
    match (wanted, image) {
        (Some(api::Size(0)), _) => refuse("its size is 0: say how large it shall be".into()),
        (Some(size), _) if !size.0.is_multiple_of(512) => {
            refuse(format!("its size, {} bytes, is no multiple of 512", size.0))
        }
        (Some(size), Some(image)) if size.0 < image => {
            refuse(format!("its size, {size}, is smaller than its image, {}", api::Size(image)))
        }
        (Some(size), _) => Ok(size.0),
        (None, Some(image)) => image
            .checked_next_multiple_of(block)
            .filter(|size| *size > 0)
            .map_or_else(|| refuse("its image is empty".into()), Ok),
        (None, None) => refuse("it has no image, so its size has to be given".into()),
    }
}

/// The size of a disk that is there already.
fn size_of_file(state: &ClusterState, index: usize, disk: &api::DiskDefinition, file: &str) -> Result<u64, ApiError> {
    let refuse = |text: String| Err(ApiError::invalid(format!("disk {index}: {text}")));
    let Some(lun) = state.luns.get(&disk.volume) else {
        return refuse(format!("volume {:?} is no LUN: only a LUN has files that no VM has", disk.volume));
    };
    if disk.size.is_some() || disk.image.is_some() {
        return refuse(format!("{file:?} is as it is: name neither a size nor an image for it"));
    }
    if matches!(disk.format, api::DiskFormat::Vhdx | api::DiskFormat::Vhd) {
        return refuse(format!(
            "a file that is there is taken as raw: name {file:?} as the image of a new disk instead"
        ));
    }
    if disk.allocate == api::Allocation::Full {
        return refuse(format!("{file:?} is there, and keeps the room that it has: allocate=full is for new disks"));
    }
    match lun.files.get(file).filter(|_| is_file_name(file)) {
        Some(found) if found.vm.is_none() => Ok(found.bytes),
        Some(_) => refuse(format!("{file:?} belongs to a VM")),
        None => refuse(format!("there is no file {file:?} on volume {:?}: see `holdfast volume ls`", disk.volume)),
    }
}

/// Refuses a disk that can never be full without its volume being full first, and one
/// that cannot be fully allocated now.
fn fits_volume(
    index: usize,
    size: u64,
    disk: &api::DiskDefinition,
    room: std::io::Result<u64>,
) -> Result<(), ApiError> {
    let volume = &disk.volume;
    let room = room.map_err(|error| {
        ApiError::new("volume_unreachable", format!("this node does not reach volume {volume:?}: {error}"))
    })?;
    if size <= room {
        return Ok(());
    }
    let (size, room) = (api::Size(size).rounded(), api::Size(room).rounded());
    let why = match disk.allocate {
        api::Allocation::Thin => format!("its size, {size}, is larger than volume {volume:?}, {room}"),
        api::Allocation::Full => {
            format!("it is to be fully allocated with {size}, and volume {volume:?} has {room} free")
        }
    };
    Err(ApiError::new("no_space", format!("disk {index}: {why}")))
}

/// The size of the file system at `path`, or what of it is free, in bytes.
fn room_at(path: &Path, allocate: api::Allocation) -> std::io::Result<u64> {
    let found = nix::sys::statvfs::statvfs(path)?;
    let blocks = match allocate {
        api::Allocation::Thin => found.blocks(),
        api::Allocation::Full => found.blocks_available(),
    };
    Ok(blocks * found.fragment_size())
}

fn known_volume(state: &ClusterState, volume: &str) -> Result<(), ApiError> {
    match state.volumes.contains_key(volume) {
        true => Ok(()),
        false => Err(ApiError::not_found("volume", volume)),
    }
}

/// Reads `/PATH` and `VOLUME:PATH`. A path on a volume never leads out of it.
fn source(text: &str) -> Result<Source, ApiError> {
    if text.starts_with('/') {
        return Ok(Source::Here(text.into()));
    }
    let inside =
        |file: &str| !file.is_empty() && Path::new(file).components().all(|part| matches!(part, Component::Normal(_)));
    match text.split_once(':') {
        Some((volume, file)) if !volume.is_empty() && inside(file) => {
            Ok(Source::OnVolume { volume: volume.into(), file: file.into() })
        }
        _ => Err(ApiError::invalid(format!(
            "{text:?} names no file: write an absolute path on the node that is asked, or VOLUME:PATH"
        ))),
    }
}

/// The absolute path of a source on this node.
fn path_of(agent: &Agent, state: &ClusterState, source: &Source) -> Result<PathBuf, ApiError> {
    match source {
        Source::Here(path) => Ok(path.clone()),
        Source::OnVolume { volume, file } => {
            known_volume(state, volume)?;
            Ok(agent.volume_path(volume, file))
        }
    }
}

async fn look_at_image(agent: &Agent, state: &ClusterState, text: &str) -> Result<Filling, ApiError> {
    let source = source(text)?;
    if let Source::OnVolume { volume, file } = &source
        && state.luns.contains_key(volume)
    {
        let found = agent.inspect_on_lun(volume, file).await?;
        let image = found.map_err(|error| ApiError::new("bad_image", error.to_string()))?;
        return Ok(Filling { path: format!("{volume}:{file}"), virtual_bytes: image.virtual_bytes });
    }
    let path = path_of(agent, state, &source)?;
    readable("image", &path).await?;
    let image = QemuImg::new("qemu-img")
        .inspect(&path, INSPECT_WITHIN)
        .await
        .map_err(|error: QemuError| ApiError::new("bad_image", error.to_string()))?;
    Ok(Filling { path: path.display().to_string(), virtual_bytes: image.virtual_bytes })
}

/// Refuses what is no readable file; its length in bytes otherwise.
async fn readable(what: &'static str, path: &Path) -> Result<u64, ApiError> {
    let path = path.to_path_buf();
    blocking(move || {
        let refuse = |why: String| {
            ApiError::new("unreadable", format!("the {what} {} cannot be used on this node: {why}", path.display()))
        };
        // Opening a named pipe would wait for its writer.
        let found = std::fs::metadata(&path).map_err(|error| refuse(error.to_string()))?;
        if !found.is_file() {
            return Err(refuse("it is not a regular file".into()));
        }
        std::fs::File::open(&path).map_err(|error| refuse(error.to_string()))?;
        Ok(found.len())
    })
    .await
}

/// Finds the volume that holds the kernel and its ramdisk, and what of them has
/// to be copied there. Copies are named by their contents: VMs share them, and a
/// definition that was printed still names them after its VM is deleted.
async fn look_at_boot(
    agent: &Agent,
    state: &ClusterState,
    wanted: &api::VmDefinition,
    boot: &api::KernelBoot,
) -> Result<Boot, ApiError> {
    let kernel = source(&boot.kernel)?;
    let initrd = boot.initrd.as_deref().map(source).transpose()?;
    let volume = boot_volume(state, wanted, &kernel, initrd.as_ref())?;
    let mut copies = Vec::new();
    let kernel = boot_file(agent, &volume, "kernel", &kernel, &mut copies).await?;
    let initrd = match &initrd {
        Some(initrd) => Some(boot_file(agent, &volume, "initrd", initrd, &mut copies).await?),
        None => None,
    };
    let append = boot.append.clone();
    let spec = DirectBoot { volume, kernel, initrd, append };
    Ok(Boot { spec, copies })
}

/// The one volume for kernel and ramdisk: the one that they name, or the first
/// disk's, or the only one that holds files.
fn boot_volume(
    state: &ClusterState,
    wanted: &api::VmDefinition,
    kernel: &Source,
    initrd: Option<&Source>,
) -> Result<String, ApiError> {
    let named = |source: &Source| match source {
        Source::OnVolume { volume, .. } => Some(volume.clone()),
        Source::Here(_) => None,
    };
    let volume = match (named(kernel), initrd.and_then(named)) {
        (Some(one), Some(other)) if one != other => {
            return Err(ApiError::invalid(format!(
                "the kernel is on volume {one:?} and its ramdisk on volume {other:?}: put both on one"
            )));
        }
        (Some(volume), _) | (None, Some(volume)) => volume,
        (None, None) => {
            let holds_files = |volume: &&String| !state.luns.contains_key(*volume);
            let mut all = state.volumes.keys().filter(holds_files);
            let only = all.next().filter(|_| all.next().is_none());
            let first = wanted.disks.first().map(|disk| &disk.volume).filter(holds_files);
            first.or(only).cloned().ok_or_else(|| {
                ApiError::invalid(
                    "a VM without a disk in a directory names its kernel as VOLUME:PATH, so that every node can read it",
                )
            })?
        }
    };
    known_volume(state, &volume)?;
    Ok(volume)
}

/// Where on `volume` a kernel or ramdisk is to be; adds to `copies` when it is
/// not there yet.
async fn boot_file(
    agent: &Agent,
    volume: &str,
    what: &'static str,
    source: &Source,
    copies: &mut Vec<Copying>,
) -> Result<String, ApiError> {
    match source {
        Source::OnVolume { file, .. } => {
            readable(what, &agent.volume_path(volume, file)).await?;
            Ok(file.clone())
        }
        Source::Here(path) => {
            let length = readable(what, path).await?;
            if length > LARGEST_BOOT_FILE {
                return Err(ApiError::invalid(format!(
                    "the {what} {} is larger than {}",
                    path.display(),
                    api::Size(LARGEST_BOOT_FILE)
                )));
            }
            let from = path.clone();
            let digest = blocking(move || {
                digest_of(&from).map_err(|error| {
                    let text = format!("the {what} {} cannot be read: {error}", from.display());
                    ApiError::new("unreadable", text)
                })
            })
            .await?;
            let file = format!("boot/{what}-{}", &digest[..16]);
            let to = agent.volume_path(volume, &file);
            let there = to.clone();
            let known = move || Ok(std::fs::metadata(there).is_ok_and(|found| found.len() == length));
            if !blocking(known).await? {
                let from = path.clone();
                copies.push(Copying { from, to });
            }
            Ok(file)
        }
    }
}

/// Copies a file so that under its new name it is there whole or not at all:
/// other VMs may boot from it, or be about to copy the same.
fn copy(copying: &Copying) -> std::io::Result<()> {
    let directory = copying.to.parent().unwrap_or(Path::new("/"));
    std::fs::create_dir_all(directory)?;
    let draft = copying.to.with_extension(Uuid::new_v4().simple().to_string());
    let copied = std::fs::copy(&copying.from, &draft)
        .and_then(|_| std::fs::File::open(&draft)?.sync_all())
        .and_then(|()| std::fs::rename(&draft, &copying.to))
        .and_then(|()| std::fs::File::open(directory)?.sync_all());
    if copied.is_err() {
        let _ = std::fs::remove_file(&draft);
    }
    copied
}

/// SHA-256 of a file, in hexadecimal.
fn digest_of(path: &Path) -> std::io::Result<String> {
    use std::io::Read;
    let mut file = std::fs::File::open(path)?.take(LARGEST_BOOT_FILE);
    let mut context = Context::new(&SHA256);
    let mut block = vec![0; 1 << 16];
    loop {
        match file.read(&mut block)? {
            0 => return Ok(hex(context.finish().as_ref())),
            read => context.update(&block[..read]),
        }
    }
}

/// Runs what waits for a disk away from the threads that answer requests.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let failed = |text: String| ApiError::new("internal", text);
    match tokio::time::timeout(INSPECT_WITHIN, tokio::task::spawn_blocking(work)).await {
        Ok(Ok(result)) => result,
        Ok(Err(error)) => Err(failed(format!("looking at a file failed: {error}"))),
        Err(_) => Err(ApiError::new(
            "volume_unreachable",
            format!("a file gave no answer for {} s: is its storage connected?", INSPECT_WITHIN.as_secs()),
        )),
    }
}

#[cfg(test)]
mod tests;
