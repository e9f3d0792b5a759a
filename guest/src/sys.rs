//! The system calls that the standard library does not offer. The only file with `unsafe`.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::mem;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

use libc::{c_int, c_void};

/// How the machine is to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Power {
    /// Power off in order.
    Off,
    /// Restart in order.
    Reboot,
    /// Kernel panic, at once.
    Crash,
}

/// Time since the kernel started, suspension included.
pub fn uptime() -> Duration {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is a valid timespec that the call only writes. It cannot fail for this clock.
    unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut now) };
    Duration::new(now.tv_sec.unsigned_abs(), u32::try_from(now.tv_nsec).unwrap_or(0))
}

/// Mounts a pseudo file system.
///
/// # Errors
/// The system's, `EBUSY` when it is mounted there already.
pub fn mount(kind: &str, target: &str) -> io::Result<()> {
    let (kind, target) = (CString::new(kind)?, CString::new(target)?);
    // SAFETY: both strings are NUL-terminated and live through the call; no data is passed.
    check(unsafe { libc::mount(kind.as_ptr(), target.as_ptr(), kind.as_ptr(), 0, std::ptr::null()) })
}

/// Loads a kernel module from an uncompressed file. One that is loaded already is no error.
///
/// # Errors
/// The system's, when the file cannot be read or the kernel refuses it.
pub fn load_module(path: &Path) -> io::Result<()> {
    let module = File::open(path)?;
    // SAFETY: the descriptor is open and the parameter string is an empty, NUL-terminated one.
    let result = unsafe { libc::syscall(libc::SYS_finit_module, module.as_raw_fd(), c"".as_ptr(), 0) };
    match check(result as c_int) {
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        result => result,
    }
}

/// Gives an interface its address and brings it up, or only brings it up.
///
/// # Errors
/// The system's, `ENODEV` when there is no such interface.
pub fn bring_up(interface: &str, address: Option<(Ipv4Addr, u8)>) -> io::Result<()> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    let mut request = interface_request(interface)?;
    if let Some((address, prefix)) = address {
        let mask = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
        request.ifr_ifru.ifru_addr = socket_address(address);
        interface_ioctl(&socket, libc::SIOCSIFADDR, &mut request)?;
        request.ifr_ifru.ifru_netmask = socket_address(Ipv4Addr::from(mask));
        interface_ioctl(&socket, libc::SIOCSIFNETMASK, &mut request)?;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as i16;
    interface_ioctl(&socket, libc::SIOCSIFFLAGS, &mut request)
}

/// Adds the default route.
///
/// # Errors
/// The system's, `ENETUNREACH` when the gateway is in no network of this machine.
pub fn add_default_route(gateway: Ipv4Addr) -> io::Result<()> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    // SAFETY: rtentry is plain C data for which all zeroes is valid.
    let mut route: libc::rtentry = unsafe { mem::zeroed() };
    route.rt_dst = socket_address(Ipv4Addr::UNSPECIFIED);
    route.rt_genmask = socket_address(Ipv4Addr::UNSPECIFIED);
    route.rt_gateway = socket_address(gateway);
    route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
    // SAFETY: the descriptor is open, and SIOCADDRT reads one rtentry, which lives through the call.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCADDRT as _, &raw mut route) })
}

/// Notices a peer that vanished without a word after about `idle` and five probes of 5 s.
///
/// # Errors
/// The system's, when the descriptor is no TCP socket.
pub fn keep_alive(socket: BorrowedFd<'_>, idle: Duration) -> io::Result<()> {
    let idle = c_int::try_from(idle.as_secs()).unwrap_or(c_int::MAX);
    for (level, option, value) in [
        (libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1),
        (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, idle),
        (libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, 5),
        (libc::IPPROTO_TCP, libc::TCP_KEEPCNT, 5),
    ] {
        let size = mem::size_of::<c_int>() as libc::socklen_t;
        let value: *const c_int = &raw const value;
        // SAFETY: the descriptor is open, and the option's value is an int that lives through the call.
        check(unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, value.cast::<c_void>(), size) })?;
    }
    Ok(())
}

/// Writes all dirty pages of all file systems and devices.
pub fn sync() {
    // SAFETY: takes no arguments and cannot fail.
    unsafe { libc::sync() };
}

/// Ends the machine. Returns only when that failed.
///
/// # Errors
/// The system's, `EPERM` without the privilege.
pub fn end(power: Power) -> io::Result<()> {
    let how = match power {
        Power::Off => libc::RB_POWER_OFF,
        Power::Reboot => libc::RB_AUTOBOOT,
        Power::Crash => return std::fs::write("/proc/sysrq-trigger", "c"),
    };
    // SAFETY: takes a constant and no memory.
    check(unsafe { libc::reboot(how) })
}

fn check(result: c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn interface_request(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: ifreq is plain C data for which all zeroes is valid.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    let bytes = std::ffi::OsStr::new(name).as_bytes();
    if bytes.len() >= request.ifr_name.len() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{name} is too long for an interface")));
    }
    for (target, byte) in request.ifr_name.iter_mut().zip(bytes) {
        *target = *byte as libc::c_char;
    }
    Ok(request)
}

fn interface_ioctl(socket: &UdpSocket, what: libc::c_ulong, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: the descriptor is open, and these calls read one ifreq, which lives through the call.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), what as _, request as *mut libc::ifreq) })
}

fn socket_address(address: Ipv4Addr) -> libc::sockaddr {
    // SAFETY: sockaddr is plain C data for which all zeroes is valid.
    let mut raw: libc::sockaddr = unsafe { mem::zeroed() };
    raw.sa_family = libc::AF_INET as libc::sa_family_t;
    // sockaddr_in: the port takes the first two bytes of sa_data, the address the next four.
    for (target, byte) in raw.sa_data[2..6].iter_mut().zip(address.octets()) {
        *target = byte as libc::c_char;
    }
    raw
}
