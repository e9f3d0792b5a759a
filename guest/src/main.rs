//! PID 1 of the guest.
//!
//! The order is that of a race: the network comes first, so that the guest answers as early as it
//! can; the disk is opened while clients already ping; the power button is armed last.

use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::thread;
use std::time::{Duration, Instant};

use holdfast_guest::cmdline::Options;
use holdfast_guest::command::Command;
use holdfast_guest::disk::{DiskError, RecordDisk};
use holdfast_guest::service::{DiskQueue, Guest};
use holdfast_guest::sys::{self, Power};
use holdfast_guest::wire::PORT;

const INTERFACE: &str = "eth0";
const DISK: &str = "/dev/vda";
/// How long a device that the bus announces may take to appear.
const DEVICE_DEADLINE: Duration = Duration::from_secs(5);
const CLOSE_DEADLINE: Duration = Duration::from_secs(10);
/// Device types of the virtio specification 1.2, section 5.
const VIRTIO_BLOCK: &str = "0x0002";

fn main() {
    if std::process::id() != 1 {
        eprintln!("holdfast-guest is the init of a virtual machine: it does nothing unless it is process 1");
        std::process::exit(2);
    }
    let mut complaints = Vec::new();
    for (kind, target) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        note(&mut complaints, &format!("cannot mount {target}"), sys::mount(kind, target));
    }
    let options = Options::parse(&fs::read_to_string("/proc/cmdline").unwrap_or_default());
    complaints.extend(options.rejected.iter().map(|option| format!("cannot understand {option} on the command line")));

    load_modules("net", &mut complaints);
    bring_up_network(&options, &mut complaints);
    let (power, powered) = sync_channel(1);
    let (guest, queue) = Guest::new(boot_id(), power);
    let udp = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, PORT)).and_then(|socket| guest.serve_udp(socket));
    note(&mut complaints, "cannot serve UDP", udp);
    let tcp = TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)).and_then(|listener| guest.serve_tcp(listener));
    note(&mut complaints, "cannot serve TCP", tcp);

    open_disk(&guest, queue, &mut complaints);
    load_modules("power", &mut complaints);
    watch_power_buttons(&guest, &mut complaints);
    apply(&options, &guest, &mut complaints);
    let banner = banner(&options, &guest);
    let served = Arc::clone(&guest);
    // On its own thread: a console that nobody drains must not hold up the machine.
    thread::spawn(move || console(&served, &banner, &complaints));

    // The sender lives in `guest`, so this ends only with a request.
    let power = powered.recv().unwrap_or(Power::Off);
    if power != Power::Crash {
        guest.close_disk(CLOSE_DEADLINE);
        sys::sync();
    }
    let failed = sys::end(power);
    eprintln!("holdfast-guest cannot end the machine: {failed:?}");
    // Returning from PID 1 is a kernel panic, which `panic=` on the command line turns into a reset.
}

fn note<T>(complaints: &mut Vec<String>, what: &str, result: io::Result<T>) {
    if let Err(error) = result {
        complaints.push(format!("{what}: {error}"));
    }
}

/// Loads the modules of a stage in the order of their file names, which the packer has put them in.
fn load_modules(stage: &str, complaints: &mut Vec<String>) {
    let mut modules: Vec<PathBuf> =
        fs::read_dir(format!("/modules/{stage}")).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    modules.sort();
    for module in modules {
        note(complaints, &format!("cannot load {}", module.display()), sys::load_module(&module));
    }
}

fn bring_up_network(options: &Options, complaints: &mut Vec<String>) {
    // Announce the address as soon as the link is up: after a failover, clients and switches learn
    // the new place from that, not from their own timeouts.
    let _ = fs::write("/proc/sys/net/ipv4/conf/all/arp_notify", "1");
    note(complaints, "cannot bring up lo", sys::bring_up("lo", None));
    if options.address.is_none() {
        complaints.push("no address: give hf.ip=ADDRESS/PREFIX on the kernel command line".to_owned());
        return;
    }
    note(complaints, "cannot bring up eth0", sys::bring_up(INTERFACE, options.address));
    if let Some(gateway) = options.gateway {
        note(complaints, "cannot add the default route", sys::add_default_route(gateway));
    }
}

fn boot_id() -> u64 {
    let uuid = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let digits: String = uuid.chars().filter(char::is_ascii_hexdigit).take(16).collect();
    u64::from_str_radix(&digits, 16).unwrap_or(0)
}

fn open_disk(guest: &Arc<Guest>, queue: DiskQueue, complaints: &mut Vec<String>) {
    load_modules("disk", complaints);
    let until = Instant::now() + DEVICE_DEADLINE;
    while !Path::new(DISK).exists() && bus_has(VIRTIO_BLOCK) && Instant::now() < until {
        thread::sleep(Duration::from_millis(2));
    }
    let disk = RecordDisk::open(Path::new(DISK), guest.boot_id(), true);
    match &disk {
        Err(DiskError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
        Err(error) => complaints.push(error.to_string()),
        Ok(_) => {}
    }
    let served = Arc::clone(guest);
    thread::spawn(move || queue.run(&served, disk));
}

fn bus_has(device_type: &str) -> bool {
    fs::read_dir("/sys/bus/virtio/devices")
        .into_iter()
        .flatten()
        .flatten()
        .any(|device| fs::read_to_string(device.path().join("device")).is_ok_and(|text| text.trim() == device_type))
}

/// Turns the ACPI power button, QEMU's `system_powerdown`, into an orderly power-off.
fn watch_power_buttons(guest: &Arc<Guest>, complaints: &mut Vec<String>) {
    const EVENT_BYTES: usize = 24;
    const EV_KEY: u16 = 1;
    const KEY_POWER: u16 = 116;
    let mut buttons = 0;
    for input in fs::read_dir("/sys/class/input").into_iter().flatten().flatten() {
        let name = fs::read_to_string(input.path().join("device/name")).unwrap_or_default();
        if !input.file_name().to_string_lossy().starts_with("event") || name.trim() != "Power Button" {
            continue;
        }
        let Ok(mut events) = fs::File::open(Path::new("/dev/input").join(input.file_name())) else {
            continue;
        };
        buttons += 1;
        let guest = Arc::clone(guest);
        thread::spawn(move || {
            // struct input_event on x86-64: two 64-bit times, type, code, value.
            let mut event = [0; EVENT_BYTES];
            while io::Read::read_exact(&mut events, &mut event).is_ok() {
                let word = |at: usize| u16::from_le_bytes([event[at], event[at + 1]]);
                if word(16) == EV_KEY && word(18) == KEY_POWER && word(20) == 1 {
                    guest.request_power(Power::Off);
                }
            }
        });
    }
    if buttons == 0 {
        complaints.push("no power button: system_powerdown will do nothing".to_owned());
    }
}

fn apply(options: &Options, guest: &Arc<Guest>, complaints: &mut Vec<String>) {
    let fill = options.fill_mb.map(Command::Fill);
    let dirty = options.dirty.map(|(rate, size)| Command::Dirty(rate, size));
    let writer = options.writer_per_s.map(|rate| Command::Writer(Some(rate)));
    for command in [fill, dirty, writer].into_iter().flatten() {
        let (answer, _) = guest.execute(&command);
        if answer != "ok" {
            complaints.push(answer);
        }
    }
}

fn banner(options: &Options, guest: &Guest) -> String {
    let ip = options.address.map_or("none".to_owned(), |(address, prefix)| format!("{address}/{prefix}"));
    format!("holdfast-guest ready ip={ip} boot_id={:016x}", guest.boot_id())
}

/// A very small shell on the serial console.
fn console(guest: &Arc<Guest>, banner: &str, complaints: &[String]) -> io::Result<()> {
    let mut output = fs::OpenOptions::new().write(true).open("/dev/console")?;
    for complaint in complaints {
        writeln!(output, "holdfast-guest: {complaint}")?;
    }
    write!(output, "{banner}\nSay help for the commands.\n> ")?;
    let mut input = BufReader::new(fs::File::open("/dev/console")?);
    let mut line = String::new();
    loop {
        line.clear();
        // The terminal's line discipline bounds a line at 4096 bytes.
        match input.read_line(&mut line) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            // A byte that is no UTF-8, e.g. noise on the line.
            Err(error) if error.kind() == io::ErrorKind::InvalidData => continue,
            Err(error) => return Err(error),
        }
        let (text, power) = match Command::parse(&line) {
            _ if line.trim().is_empty() => (String::new(), None),
            Ok(command) => guest.execute(&command),
            Err(error) => (format!("error {error}"), None),
        };
        if !text.is_empty() {
            writeln!(output, "{text}")?;
        }
        if let Some(power) = power {
            guest.request_power(power);
        }
        write!(output, "> ")?;
    }
}
