//! Images, made by a real qemu-img.

mod common;

use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use common::{Guest, SOON, disk, qemu_img, spec};
use holdfast_core::{Allocation, DiskFormat};
use holdfast_qemu::{DiskAt, Layout, QemuError, QemuImg};
use tempfile::TempDir;

fn tool() -> QemuImg {
    QemuImg::new(qemu_img())
}

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(directory)
        .expect("a directory")
        .map(|entry| entry.expect("an entry").file_name().into_string().expect("text"))
        .collect();
    names.sort();
    names
}

#[tokio::test]
async fn made_whole_or_not_at_all() {
    let directory = TempDir::with_prefix("hfq-").expect("a directory");
    for (name, format) in [("a.raw", DiskFormat::Raw), ("b, c.qcow2", DiskFormat::Qcow2)] {
        let path = directory.path().join(name);
        tool().create(&path, format, 8 << 20, SOON).await.expect("made");
        let image = tool().inspect(&path, SOON).await.expect("an image");
        assert_eq!(image.virtual_bytes, 8 << 20);
        assert_eq!(image.format, format.as_str());
        assert!(image.actual_bytes < 1 << 20);
        let again = tool().create(&path, format, 8 << 20, SOON).await;
        assert!(matches!(again, Err(QemuError::Exists { .. })));
    }
    // Larger than any file can be.
    let path = directory.path().join("huge");
    let huge = tool().create(&path, DiskFormat::Raw, 1 << 63, SOON).await;
    assert!(matches!(huge, Err(QemuError::Image { .. })), "{huge:?}");
    assert_eq!(names(directory.path()), ["a.raw", "b, c.qcow2"]);
    let nowhere = directory.path().join("no/where");
    let nowhere = tool().create(&nowhere, DiskFormat::Raw, 1 << 20, SOON).await;
    assert!(matches!(nowhere, Err(QemuError::Io { .. })));
}

#[tokio::test]
async fn copied_with_progress_into_a_larger_disk() {
    let directory = TempDir::with_prefix("hfq-").expect("a directory");
    let source = directory.path().join("source.raw");
    let content: Vec<u8> = (0..8_u32 << 20).map(|at| (at / 509) as u8).collect();
    std::fs::write(&source, &content).expect("a source");
    // What an interrupted attempt left behind goes.
    let left = directory.path().join(".disk.qcow2.partial-x1");
    std::fs::write(&left, "half").expect("a leftover");

    let (qcow2, raw) = (directory.path().join("disk.qcow2"), directory.path().join("disk.raw"));
    let mut seen = Vec::new();
    tool()
        .convert(&source, &qcow2, DiskFormat::Qcow2, Some(16 << 20), SOON, |at| {
            seen.push(at);
        })
        .await
        .expect("copied");
    assert!(seen.len() > 2 && seen.is_sorted(), "{seen:?}");
    assert_eq!(seen.last(), Some(&1.0));
    let image = tool().inspect(&qcow2, SOON).await.expect("an image");
    assert_eq!(image.virtual_bytes, 16 << 20);

    // A smaller wish does not cut anything off.
    tool().convert(&qcow2, &raw, DiskFormat::Raw, Some(1 << 20), SOON, |_| {}).await.expect("copied back");
    let back = std::fs::read(&raw).expect("a disk");
    assert_eq!(back.len(), 16 << 20);
    assert!(back.starts_with(&content));
    assert!(back[content.len()..].iter().all(|byte| *byte == 0));
    assert_eq!(names(directory.path()), ["disk.qcow2", "disk.raw", "source.raw"]);

    let again = tool().convert(&source, &raw, DiskFormat::Raw, None, SOON, |_| {}).await;
    assert!(matches!(again, Err(QemuError::Exists { .. })));
}

#[tokio::test]
async fn fully_allocated_disks_have_their_room_from_the_start() {
    use std::os::unix::fs::MetadataExt as _;
    let directory = TempDir::with_prefix("hfq-").expect("a directory");
    let source = directory.path().join("source");
    std::fs::write(&source, [7; 1 << 20]).expect("a source");
    for format in [DiskFormat::Raw, DiskFormat::Qcow2, DiskFormat::Vhdx, DiskFormat::Vhd] {
        let layout = Layout { format, allocation: Allocation::Full };
        for (name, image) in [("empty", None), ("copied", Some(&source))] {
            let path = directory.path().join(format!("{name}.{}", format.as_str()));
            match image {
                None => tool().create(&path, layout, 8 << 20, SOON).await.expect("made"),
                Some(image) => {
                    tool().convert(image, &path, layout, Some(8 << 20), SOON, |_| {}).await.expect("copied");
                    let back = directory.path().join(format!("{}.back", format.as_str()));
                    tool().convert(&path, &back, DiskFormat::Raw, None, SOON, |_| {}).await.expect("copied back");
                    let back = std::fs::read(back).expect("a disk");
                    assert_eq!(back.len(), 8 << 20);
                    assert!(back[..1 << 20].iter().all(|byte| *byte == 7));
                    assert!(back[1 << 20..].iter().all(|byte| *byte == 0));
                }
            }
            let taken = std::fs::metadata(&path).expect("a disk").blocks() * 512;
            assert!(taken >= 8 << 20, "{}: {taken}", path.display());
        }
    }
    let full = Layout { format: DiskFormat::Raw, allocation: Allocation::Full };
    let refused = tool().create(&directory.path().join("huge"), full, 1 << 43, SOON).await.expect_err("no room");
    assert!(refused.to_string().contains("cannot take room for all of"), "{refused}");
    assert!(names(directory.path()).iter().all(|name| !name.contains("huge")));
}

/// A disk as no geometry of cylinders, heads and sectors describes it.
const ODD_BYTES: usize = (8 << 20) + 512;

#[tokio::test]
async fn vhds_and_vhdxs_are_known_by_what_is_in_them_and_lose_no_byte() {
    let directory = TempDir::with_prefix("hfq-").expect("a directory");
    let source = directory.path().join("source");
    let content: Vec<u8> = (0..ODD_BYTES).map(|at| (at / 509) as u8).collect();
    std::fs::write(&source, &content).expect("a source");
    for (format, allocation) in [
        (DiskFormat::Vhdx, Allocation::Thin),
        (DiskFormat::Vhdx, Allocation::Full),
        (DiskFormat::Vhd, Allocation::Thin),
        (DiskFormat::Vhd, Allocation::Full),
    ] {
        let path = directory.path().join(format!("{allocation:?}.{}.img", format.extension()));
        let layout = Layout { format, allocation };
        tool().convert(&source, &path, layout, None, SOON, |_| {}).await.expect("copied");
        let image = tool().inspect(&path, SOON).await.expect("an image");
        assert_eq!((image.format.as_str(), image.virtual_bytes), (format.as_str(), ODD_BYTES as u64));
        let back = path.with_extension("raw");
        tool().convert(&path, &back, DiskFormat::Raw, None, SOON, |_| {}).await.expect("copied back");
        assert!(std::fs::read(&back).expect("a disk") == content, "{layout:?}");
    }
    // One of an author whom QEMU does not know: it would believe the geometry.
    let path = directory.path().join("Full.vhd.img");
    let mut bytes = std::fs::read(&path).expect("an image");
    let footer = bytes.len() - 512;
    bytes[footer + 28..footer + 32].copy_from_slice(b"vbox");
    bytes[footer + 56..footer + 60].copy_from_slice(&[0, 200, 4, 17]);
    bytes[footer + 64..footer + 68].fill(0);
    let sum: u32 = bytes[footer..].iter().map(|byte| u32::from(*byte)).sum();
    bytes[footer + 64..footer + 68].copy_from_slice(&(!sum).to_be_bytes());
    std::fs::write(&path, &bytes).expect("an image");
    let image = tool().inspect(&path, SOON).await.expect("an image");
    assert_eq!(image.virtual_bytes, ODD_BYTES as u64);
    // A difference to another disk would be read as if that were empty.
    let path = directory.path().join("Thin.vhd.img");
    let mut bytes = std::fs::read(&path).expect("an image");
    bytes[63] = 4;
    bytes[64..68].fill(0);
    let sum: u32 = bytes[..512].iter().map(|byte| u32::from(*byte)).sum();
    bytes[64..68].copy_from_slice(&(!sum).to_be_bytes());
    std::fs::write(&path, &bytes).expect("an image");
    let refused = tool().inspect(&path, SOON).await.expect_err("refused");
    assert!(
        matches!(&refused, QemuError::NotSelfContained { refers_to, .. } if refers_to.contains("parent")),
        "{refused}"
    );
}

#[tokio::test]
async fn given_up_leaves_nothing_behind() {
    let directory = TempDir::with_prefix("hfq-").expect("a directory");
    let source = directory.path().join("source.raw");
    let file = std::fs::File::create(&source).expect("a source");
    for at in 0..64 {
        file.write_all_at(&[7; 64 << 10], at << 20).expect("content");
    }
    drop(file);
    let path = directory.path().join("disk");
    // Dropped as soon as it has begun to copy.
    let (begun, copying) = tokio::sync::oneshot::channel();
    let mut begun = Some(begun);
    let copy = tool();
    let copy = copy.convert(&source, &path, DiskFormat::Qcow2, None, SOON, |_| {
        begun.take().map(|begun| begun.send(()));
    });
    tokio::select! {
        // The whole may be quicker than the report of its beginning.
        done = copy => done.expect("copied"),
        _ = copying => {
            assert_eq!(names(directory.path()), ["source.raw"]);
        }
    }
    let late = directory.path().join("late");
    let late = tool().convert(&source, &late, DiskFormat::Qcow2, None, Duration::from_millis(1), |_| {}).await;
    assert!(matches!(late, Err(QemuError::TooSlow { .. })), "{late:?}");
    assert!(names(directory.path()).iter().all(|name| !name.starts_with('.')));
}

#[tokio::test]
async fn images_that_refer_to_other_files_are_refused() {
    let directory = TempDir::with_prefix("hfq-").expect("a directory");
    let secret = directory.path().join("secret");
    std::fs::write(&secret, vec![b's'; 1 << 20]).expect("a secret");
    let trap = directory.path().join("trap.qcow2");
    let made = Command::new(qemu_img())
        .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
        .args([&secret, &trap])
        .status()
        .expect("qemu-img must be installed: apt install qemu-utils");
    assert!(made.success());
    let refused = tool().inspect(&trap, SOON).await.expect_err("refused");
    assert!(
        matches!(&refused, QemuError::NotSelfContained { refers_to, .. } if refers_to.ends_with("secret")),
        "{refused:?}"
    );
    let disk = directory.path().join("disk");
    let copied = tool().convert(&trap, &disk, DiskFormat::Raw, None, SOON, |_| {}).await;
    assert!(matches!(copied, Err(QemuError::NotSelfContained { .. })));
    assert!(!disk.exists());
    let protocol = tool().inspect(Path::new("json:{}"), SOON).await;
    assert!(matches!(protocol, Err(QemuError::Image { .. })));
    let absent = tool().inspect(&directory.path().join("absent"), SOON).await;
    assert!(matches!(absent, Err(QemuError::Io { .. })));
}

#[tokio::test]
async fn a_disk_in_use_is_measured_but_not_changed() {
    let directory = TempDir::with_prefix("hfq-").expect("a directory");
    let path = directory.path().join("disk.qcow2");
    tool().create(&path, DiskFormat::Qcow2, 1 << 20, SOON).await.expect("made");
    let mut spec = spec();
    spec.disks = vec![disk(DiskFormat::Qcow2)];
    let mut guest = Guest::start(&spec, |launch| launch.disks = vec![DiskAt::File(path.clone())]).await;
    let image = tool().inspect(&path, SOON).await.expect("measured");
    assert_eq!(image.virtual_bytes, 1 << 20);
    let resized = tool().resize(&path, DiskFormat::Qcow2, 2 << 20, SOON).await;
    assert!(matches!(resized, Err(QemuError::Locked { .. })), "{resized:?}");
    guest.process.kill();
    tool().resize(&path, DiskFormat::Qcow2, 2 << 20, SOON).await.expect("resized");
    let image = tool().inspect(&path, SOON).await.expect("an image");
    assert_eq!(image.virtual_bytes, 2 << 20);
    assert!(path.metadata().expect("metadata").blocks() > 0);
}

#[tokio::test]
async fn without_qemu_img_it_says_what_to_install() {
    let directory = TempDir::with_prefix("hfq-").expect("a directory");
    let path = directory.path().join("disk");
    let missing = QemuImg::new("/nonexistent/qemu-img").create(&path, DiskFormat::Raw, 1 << 20, SOON).await;
    let text = missing.expect_err("missing").to_string();
    assert!(text.contains("qemu-utils"), "{text}");
    assert!(names(directory.path()).is_empty());
}

#[tokio::test]
async fn an_image_that_lacks_its_end_is_refused() {
    let directory = TempDir::with_prefix("hfq-").expect("a directory");
    let (plain, source) = (directory.path().join("plain"), directory.path().join("source.qcow2"));
    let content: Vec<u8> = (0..1_u32 << 20).flat_map(|word| word.wrapping_mul(0x9e37_79b9).to_le_bytes()).collect();
    std::fs::write(&plain, &content).expect("contents");
    tool().convert(&plain, &source, DiskFormat::Qcow2, None, SOON, |_| {}).await.expect("made");
    let whole = std::fs::read(&source).expect("an image");
    std::fs::write(&source, &whole[..whole.len() / 2]).expect("half of it");
    let copy = directory.path().join("copy.raw");
    let refused = tool().convert(&source, &copy, DiskFormat::Raw, None, SOON, |_| {}).await;
    let told = refused.expect_err("half an image was taken for a whole one").to_string();
    assert!(told.contains("source.qcow2") && told.contains("fetch it again"), "{told}");
    assert_eq!(names(directory.path()), ["plain", "source.qcow2"]);
}
