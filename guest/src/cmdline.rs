//! What the kernel command line asks of the guest.

use std::net::Ipv4Addr;

/// The `hf.*` options. Everything else on the command line is the kernel's.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Options {
    /// `hf.ip=ADDRESS/PREFIX`.
    pub address: Option<(Ipv4Addr, u8)>,
    /// `hf.gw=ADDRESS`.
    pub gateway: Option<Ipv4Addr>,
    /// `hf.writer=RATE`: records per second that the guest writes by itself.
    pub writer_per_s: Option<u32>,
    /// `hf.dirty=MB_PER_S,MB`: how fast it dirties how much memory.
    pub dirty: Option<(u32, u32)>,
    /// `hf.fill=MB`: memory that it fills with incompressible bytes.
    pub fill_mb: Option<u32>,
    /// Options that could not be understood, as given.
    pub rejected: Vec<String>,
}

impl Options {
    /// Reads a command line. An option that makes no sense is set aside, not fatal: a guest that
    /// says so on its console is easier to find than one that does not boot.
    pub fn parse(cmdline: &str) -> Self {
        let mut options = Options::default();
        for word in cmdline.split_ascii_whitespace() {
            let Some((name, value)) = word.strip_prefix("hf.").and_then(|option| option.split_once('=')) else {
                if word.starts_with("hf.") {
                    options.rejected.push(word.to_owned());
                }
                continue;
            };
            let understood = match name {
                "ip" => set(&mut options.address, address(value)),
                // An empty gateway is what a template without one produces.
                "gw" if value.is_empty() => true,
                "gw" => set(&mut options.gateway, value.parse().ok()),
                "writer" => set(&mut options.writer_per_s, value.parse().ok()),
                "dirty" => set(&mut options.dirty, pair(value)),
                "fill" => set(&mut options.fill_mb, value.parse().ok()),
                _ => false,
            };
            if !understood {
                options.rejected.push(word.to_owned());
            }
        }
        options
    }
}

fn set<T>(option: &mut Option<T>, value: Option<T>) -> bool {
    let understood = value.is_some();
    if understood {
        *option = value;
    }
    understood
}

fn address(value: &str) -> Option<(Ipv4Addr, u8)> {
    let (address, prefix) = value.split_once('/')?;
    let prefix = prefix.parse().ok().filter(|prefix| (1..=32).contains(prefix))?;
    Some((address.parse().ok()?, prefix))
}

fn pair(value: &str) -> Option<(u32, u32)> {
    let (first, second) = value.split_once(',')?;
    Some((first.parse().ok()?, second.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_options_are_understood() {
        let options = Options::parse(
            "console=ttyS0 quiet hf.ip=10.0.0.5/24 hf.gw=10.0.0.1 hf.writer=50 hf.dirty=100,256 hf.fill=64\n",
        );
        assert_eq!(options.address, Some((Ipv4Addr::new(10, 0, 0, 5), 24)));
        assert_eq!(options.gateway, Some(Ipv4Addr::new(10, 0, 0, 1)));
        assert_eq!((options.writer_per_s, options.dirty, options.fill_mb), (Some(50), Some((100, 256)), Some(64)));
        assert_eq!(options.rejected, Vec::<String>::new());
    }

    #[test]
    fn nonsense_is_set_aside() {
        let options = Options::parse("hf.ip=10.0.0.5 hf.ip=1.2.3.4/33 hf.dirty=5 hf.gw= hf.bogus=1 hf.flag");
        assert_eq!(options.address, None);
        assert_eq!(options.rejected, ["hf.ip=10.0.0.5", "hf.ip=1.2.3.4/33", "hf.dirty=5", "hf.bogus=1", "hf.flag"]);
    }
}
