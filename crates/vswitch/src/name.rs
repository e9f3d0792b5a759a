//! Interface names that are stable, readable and short enough for the kernel.

use crate::error::{Error, Result};

/// Every bridge that stands for a switch starts with this.
pub const SWITCH_PREFIX: &str = "hf-";

/// Every tap of a VM starts with this.
pub const TAP_PREFIX: &str = "hft";

/// Longest interface name, in bytes (`IFNAMSIZ` of `linux/if.h` less the closing NUL).
const MAX_INTERFACE: usize = 15;

/// Longest switch name, in bytes: it has to fit into the bridge's alias beside the uplink.
const MAX_SWITCH: usize = 64;

/// The bridge of the switch called `switch`: `hf-<name>` where that fits, else a piece of the name
/// and a hash of the whole, parted by a `~` that no plain name has, so the two forms never meet.
///
/// # Errors
/// [`Error::InvalidName`] when the name is empty, longer than 64 bytes, or has characters that a
/// terminal or the interface alias would garble.
pub fn bridge_name(switch: &str) -> Result<String> {
    let invalid = |why| Error::InvalidName { what: "switch", name: switch.to_owned(), why };
    if switch.is_empty() {
        return Err(invalid("it is empty"));
    }
    if switch.len() > MAX_SWITCH {
        return Err(invalid("it is longer than 64 bytes"));
    }
    if switch.trim() != switch {
        return Err(invalid("it starts or ends with a space"));
    }
    if switch.chars().any(char::is_control) {
        return Err(invalid("it has control characters"));
    }
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if SWITCH_PREFIX.len() + switch.len() <= MAX_INTERFACE && switch.chars().all(plain) {
        return Ok(format!("{SWITCH_PREFIX}{switch}"));
    }
    let piece: String = switch.chars().filter(|c| plain(*c)).take(5).collect();
    Ok(format!("{SWITCH_PREFIX}{piece}~{}", base32(fnv1a(switch), 6)))
}

/// The tap of the NIC number `nic_index` of the VM with the id `vm_id`: 40 bits of hash, so that
/// among 1,000 VMs two share a name with a probability of 5 in ten million.
pub fn tap_name(vm_id: &str, nic_index: u8) -> String {
    format!("{TAP_PREFIX}{}-{nic_index}", base32(fnv1a(vm_id), 8))
}

/// Refuses what the kernel would refuse (`dev_valid_name` in `net/core/dev.c`), and `%`, which it
/// takes for a pattern.
pub(crate) fn check_interface(what: &'static str, name: &str) -> Result<()> {
    let why = if name.is_empty() {
        "it is empty"
    } else if name.len() > MAX_INTERFACE {
        "it is longer than 15 bytes"
    } else if name == "." || name == ".." {
        "the kernel keeps it for itself"
    } else if name.contains(|c: char| c.is_whitespace() || c.is_control() || "/:%".contains(c)) {
        "it has a space, '/', ':' or '%'"
    } else {
        return Ok(());
    };
    Err(Error::InvalidName { what, name: name.to_owned(), why })
}

/// Refuses a tap name that [`tap_name`] could not have made: a reconciler would never find it.
pub(crate) fn check_tap(name: &str) -> Result<()> {
    check_interface("tap", name)?;
    if name.starts_with(TAP_PREFIX) {
        return Ok(());
    }
    Err(Error::InvalidName { what: "tap", name: name.to_owned(), why: "the name of a VM's tap starts with \"hft\"" })
}

/// FNV-1a, 64 bits (draft-eastlake-fnv): not for secrets, but the same on every host and in every
/// version, which the standard library's hashers do not promise.
fn fnv1a(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

/// The lowest `digits` * 5 bits in lower-case base 32 without look-alikes. The halves are folded
/// first: the low bits of FNV alone depend little on the last bytes' high bits.
fn base32(hash: u64, digits: usize) -> String {
    const ALPHABET: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";
    let folded = hash ^ (hash >> 37);
    (0..digits).map(|i| char::from(ALPHABET[(folded >> (5 * i)) as usize & 31])).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn short_switch_names_are_readable() {
        assert_eq!(bridge_name("lan").unwrap(), "hf-lan");
        assert_eq!(bridge_name("production12").unwrap(), "hf-production12");
        assert_eq!(bridge_name("Lan").unwrap(), "hf-Lan");
    }

    #[test]
    fn long_and_odd_switch_names_are_hashed() {
        let long = bridge_name("production-east-1").unwrap();
        assert!(long.starts_with("hf-produ~"), "{long}");
        assert_eq!(long.len(), 15);
        assert_ne!(long, bridge_name("production-east-2").unwrap());
        assert!(bridge_name("Büro links").unwrap().starts_with("hf-Broli~"));
    }

    /// The names are in the kernels of running hosts: a change would orphan their bridges and taps.
    #[test]
    fn names_never_change() {
        assert_eq!(bridge_name("production-east-1").unwrap(), "hf-produ~3j7r44");
        assert_eq!(tap_name("6e1c5c2e-1f5a-4a55-9d6c-6c8f3f1f2a01", 0), "hftnetkj156-0");
        assert_eq!(tap_name("6e1c5c2e-1f5a-4a55-9d6c-6c8f3f1f2a01", 255), "hftnetkj156-255");
    }

    #[test]
    fn unusable_switch_names_are_refused() {
        for name in ["", " lan", "lan ", "a\nb", "a\u{7}", &"x".repeat(65)] {
            assert!(matches!(bridge_name(name), Err(Error::InvalidName { .. })), "{name:?}");
        }
    }

    #[test]
    fn interface_names_follow_the_kernel() {
        for name in ["eth0", "vmbr0", "bond0.100", "0123456789abcde"] {
            check_interface("uplink", name).unwrap();
        }
        for name in ["", ".", "..", "a b", "a/b", "a:b", "eth%d", "0123456789abcdef"] {
            assert!(check_interface("uplink", name).is_err(), "{name:?}");
        }
        assert!(check_tap("tap0").is_err());
    }

    proptest! {
        #[test]
        fn every_switch_name_gives_a_usable_bridge(name in "\\PC{1,40}") {
            if let Ok(bridge) = bridge_name(&name) {
                prop_assert!(check_interface("bridge", &bridge).is_ok(), "{}", bridge);
                prop_assert!(bridge.starts_with(SWITCH_PREFIX));
                prop_assert!(!bridge.starts_with(TAP_PREFIX));
            }
        }

        #[test]
        fn different_switches_have_different_bridges(a in "[ -~]{1,40}", b in "[ -~]{1,40}") {
            if let (Ok(left), Ok(right)) = (bridge_name(&a), bridge_name(&b)) {
                prop_assert_eq!(left == right, a == b);
            }
        }

        #[test]
        fn every_vm_gives_a_usable_tap(id in any::<u128>(), nic in any::<u8>()) {
            let tap = tap_name(&id.to_string(), nic);
            prop_assert!(check_tap(&tap).is_ok(), "{}", tap);
            prop_assert_ne!(tap, tap_name(&id.wrapping_add(1).to_string(), nic));
        }
    }
}
