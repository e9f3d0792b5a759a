//! System calls that no crate wraps: taps and Ethernet speeds. The only file here with
//! `unsafe`.

use std::ffi::c_int;
use std::fs::{File, OpenOptions};
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

/// `ETHTOOL_GSET` of `linux/ethtool.h`: old, but the kernel answers it for every driver.
const ETHTOOL_GSET: u32 = 1;

/// `struct ethtool_cmd` of `linux/ethtool.h`.
#[repr(C)]
#[derive(Default)]
struct EthtoolCmd {
    cmd: u32,
    supported: u32,
    advertising: u32,
    speed: u16,
    duplex: u8,
    port: u8,
    phy_address: u8,
    transceiver: u8,
    autoneg: u8,
    mdio_support: u8,
    maxtxpkt: u32,
    maxrxpkt: u32,
    speed_hi: u16,
    eth_tp_mdix: u8,
    eth_tp_mdix_ctrl: u8,
    lp_advertising: u32,
    reserved: [u32; 2],
}

fn check(result: c_int) -> io::Result<c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// A request about the interface `name`. The caller has checked that the name fits.
fn interface_request(name: &str) -> libc::ifreq {
    // SAFETY: ifreq is plain old data, for which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    let room = request.ifr_name.len() - 1;
    for (to, from) in request.ifr_name[..room].iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request
}

/// Attaches to the tap `name`, which is made when it is not there, in this thread's namespace.
/// Non-blocking; every frame is preceded by a 10-byte `virtio_net_hdr`.
pub fn tap_open(name: &str) -> io::Result<OwnedFd> {
    let tap: File = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")?;
    let mut request = interface_request(name);
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as i16;
    // SAFETY: TUNSETIFF reads and writes one ifreq, which outlives the call; the descriptor is open.
    check(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) })?;
    Ok(tap.into())
}

/// Lets the tap outlive its descriptors.
pub fn tap_persist(tap: &OwnedFd) -> io::Result<()> {
    // SAFETY: TUNSETPERSIST takes a plain number and no pointer; the descriptor is open.
    check(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETPERSIST as _, 1 as libc::c_ulong) })?;
    Ok(())
}

/// A socket for questions about interfaces, in this thread's namespace.
pub fn query_socket() -> io::Result<OwnedFd> {
    socket(libc::AF_INET, libc::SOCK_DGRAM)
}

fn socket(family: c_int, kind: c_int) -> io::Result<OwnedFd> {
    // SAFETY: no pointers are passed.
    let fd = check(unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: the descriptor was just opened and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The link speed of `name` in Mbit/s, if its driver knows one.
pub fn link_speed(socket: &OwnedFd, name: &str) -> Option<u32> {
    let mut command = EthtoolCmd { cmd: ETHTOOL_GSET, ..EthtoolCmd::default() };
    let mut request = interface_request(name);
    request.ifr_ifru.ifru_data = (&raw mut command).cast();
    // SAFETY: SIOCETHTOOL with ETHTOOL_GSET writes one ethtool_cmd through ifru_data; the layout is
    // the kernel's, and both structures outlive the call.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL as _, &raw mut request) }).ok()?;
    let speed = u32::from(command.speed_hi) << 16 | u32::from(command.speed);
    // SPEED_UNKNOWN is -1, in old drivers cut to 16 bits.
    (speed != 0 && speed != u32::MAX && speed != u32::from(u16::MAX)).then_some(speed)
}
