//! Amounts of memory and storage as people write them.

use std::fmt;
use std::str::FromStr;

use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use utoipa::ToSchema;

/// Bytes, written like `512MiB` or `20G`; every unit counts in steps of 1024, as
/// QEMU's do. Written out in the greatest unit that divides it, so nothing is
/// rounded; read from text or from a plain number of bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, ToSchema)]
#[schema(value_type = String, example = "20GiB")]
pub struct Size(pub u64);

impl Size {
    /// Rounded to one decimal, for sentences and tables: `1.5 GiB`.
    pub fn rounded(self) -> String {
        let unit = (self.0.max(1).ilog2() / 10) as usize;
        let number = self.0 as f64 / (1_u64 << (10 * unit)) as f64;
        let suffix = if unit == 0 { "B".into() } else { format!("{}iB", UNITS[unit]) };
        match number.fract() == 0.0 {
            true => format!("{number} {suffix}"),
            false => format!("{number:.1} {suffix}"),
        }
    }
}

/// A text that is no size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadSize(String);

impl fmt::Display for BadSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:?} is not a size: write a whole number and a unit (K, M, G, T or KiB, MiB, GiB, TiB), like 512M or 20GiB",
            self.0
        )
    }
}

impl std::error::Error for BadSize {}

/// Units by their exponent of 1024.
const UNITS: [&str; 7] = ["", "K", "M", "G", "T", "P", "E"];

impl FromStr for Size {
    type Err = BadSize;

    fn from_str(text: &str) -> Result<Self, BadSize> {
        let bad = || BadSize(text.into());
        let text = text.trim();
        let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
        let unit = text[digits.len()..].trim().to_ascii_uppercase();
        let number: u64 = digits.parse().map_err(|_| bad())?;
        // "20GB" is refused: half of its readers would mean 10^9.
        let unit = match unit.as_str() {
            "B" => "",
            unit => unit.strip_suffix("IB").unwrap_or(unit),
        };
        let exponent = UNITS.iter().position(|known| *known == unit).ok_or_else(bad)?;
        number.checked_mul(1 << (10 * exponent)).map(Size).ok_or_else(bad)
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let exponent = match self.0 {
            0 => 0,
            bytes => (bytes.trailing_zeros() / 10) as usize,
        };
        match (self.0 >> (10 * exponent), exponent) {
            (number, 0) => write!(f, "{number}B"),
            (number, exponent) => write!(f, "{number}{}iB", UNITS[exponent]),
        }
    }
}

impl Serialize for Size {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct AsPeopleWrite;
        impl Visitor<'_> for AsPeopleWrite {
            type Value = Size;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size like 512M or 20GiB, or a number of bytes")
            }
            fn visit_u64<E: de::Error>(self, bytes: u64) -> Result<Size, E> {
                Ok(Size(bytes))
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Size, E> {
                text.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_any(AsPeopleWrite)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn people_write_sizes_in_many_ways() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("512B", 512),
            ("512M", 512 << 20),
            ("512 MiB", 512 << 20),
            ("20g", 20 << 30),
            ("20GiB", 20 << 30),
            ("3T", 3 << 40),
        ] {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
        for text in ["", "G", "-1G", "1.5G", "20GB", "20X", "99999999999E", "20G20"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
    }

    #[test]
    fn rounded_sizes_are_short() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (512 << 20, "512 MiB"),
            ((3 << 30) / 2, "1.5 GiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(Size(bytes).rounded(), text);
        }
    }

    #[test]
    fn a_size_comes_as_text_or_as_a_number_of_bytes() {
        assert_eq!(serde_json::from_str::<Size>("1048576").unwrap(), Size(1 << 20));
        assert_eq!(serde_json::from_str::<Size>("\"1M\"").unwrap(), Size(1 << 20));
        let refused = serde_json::from_str::<Size>("\"1X\"").unwrap_err().to_string();
        assert!(refused.contains("is not a size"), "{refused}");
        assert!(serde_json::from_str::<Size>("-1").is_err());
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back_exactly(bytes: u64) {
            prop_assert_eq!(Size(bytes).to_string().parse(), Ok(Size(bytes)));
        }
    }
}
