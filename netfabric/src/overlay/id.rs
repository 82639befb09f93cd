//! The names that the overlay knows things by: ports, hardware addresses, networks.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use uuid::Uuid;

/// Names one port (a guest's network interface) for as long as it exists. Displayed as a hyphenated UUID.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PortId(Uuid);

impl PortId {
    /// Makes a port id from its UUID.
    pub const fn new(uuid: Uuid) -> Self {
        Self(uuid)
    }

    /// Draws a new random id.
    pub fn random() -> Self {
        Self(Uuid::new_v4())
    }

    /// The UUID itself.
    pub const fn as_uuid(&self) -> &Uuid {
        &self.0
    }
}

impl fmt::Display for PortId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.as_hyphenated().fmt(f)
    }
}

impl fmt::Debug for PortId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for PortId {
    type Err = uuid::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Uuid::parse_str(text).map(Self)
    }
}

impl From<Uuid> for PortId {
    fn from(uuid: Uuid) -> Self {
        Self(uuid)
    }
}

impl From<PortId> for Uuid {
    fn from(port: PortId) -> Self {
        port.0
    }
}

/// An Ethernet hardware address. Text form `02:00:5e:10:00:01`, which is also its form in JSON and TOML.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MacAddr([u8; 6]);

impl MacAddr {
    /// The address that every station listens to.
    pub const BROADCAST: Self = Self([0xff; 6]);

    /// Makes an address from its six bytes, in the order of transmission.
    pub const fn new(bytes: [u8; 6]) -> Self {
        Self(bytes)
    }

    /// The six bytes, in the order of transmission.
    pub const fn octets(self) -> [u8; 6] {
        self.0
    }

    /// True for group addresses, the broadcast address among them.
    pub const fn is_multicast(self) -> bool {
        self.0[0] & 1 == 1
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text that is no hardware address.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is not a hardware address like 02:00:5e:10:00:01")]
pub struct ParseMacError(String);

impl FromStr for MacAddr {
    type Err = ParseMacError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseMacError(text.chars().take(40).collect());
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts
                .next()
                .filter(|part| part.len() == 2 && part.bytes().all(|byte| byte.is_ascii_hexdigit()))
                .ok_or_else(error)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| error())?;
        }
        if parts.next().is_some() { Err(error()) } else { Ok(Self(bytes)) }
    }
}

impl Serialize for MacAddr {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            serializer.collect_str(self)
        } else {
            self.0.serialize(serializer)
        }
    }
}

impl<'de> Deserialize<'de> for MacAddr {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
        } else {
            Deserialize::deserialize(deserializer).map(Self)
        }
    }
}

/// Virtual network identifier: the number, of 24 bits, that stands in each frame between nodes and keeps networks apart.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct Vni(u32);

impl Vni {
    /// The largest identifier.
    pub const MAX: u32 = (1 << 24) - 1;

    /// The number itself.
    pub const fn get(self) -> u32 {
        self.0
    }
}

/// A number that is no network identifier.
#[derive(Debug, thiserror::Error)]
#[error("network identifier {0} is not in 1 to {max}", max = Vni::MAX)]
pub struct VniRangeError(u32);

impl TryFrom<u32> for Vni {
    type Error = VniRangeError;

    fn try_from(number: u32) -> Result<Self, Self::Error> {
        if (1..=Self::MAX).contains(&number) { Ok(Self(number)) } else { Err(VniRangeError(number)) }
    }
}

impl From<Vni> for u32 {
    fn from(vni: Vni) -> Self {
        vni.0
    }
}

impl fmt::Display for Vni {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for Vni {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mac_text_round_trips_and_rejects_other_forms() {
        let mac = MacAddr::new([2, 0, 0x5e, 0x10, 0, 0xff]);
        assert_eq!(mac.to_string(), "02:00:5e:10:00:ff");
        assert_eq!(mac.to_string().parse::<MacAddr>().unwrap(), mac);
        for wrong in [
            "",
            "02:00:5e:10:00",
            "02:00:5e:10:00:ff:01",
            "2:0:5e:10:0:ff",
            "02-00-5e-10-00-ff",
            "+2:00:5e:10:00:ff",
        ] {
            assert!(wrong.parse::<MacAddr>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn mac_and_vni_survive_json_and_postcard() {
        let value = (MacAddr::new([2, 1, 2, 3, 4, 5]), Vni::try_from(77).unwrap(), PortId::random());
        let json = serde_json::to_string(&value).unwrap();
        assert!(json.starts_with("[\"02:01:02:03:04:05\",77,"));
        assert_eq!(serde_json::from_str::<(MacAddr, Vni, PortId)>(&json).unwrap(), value);
        let binary = postcard::to_stdvec(&value).unwrap();
        assert_eq!(postcard::from_bytes::<(MacAddr, Vni, PortId)>(&binary).unwrap(), value);
        assert!(serde_json::from_str::<Vni>("0").is_err());
        assert!(serde_json::from_str::<Vni>("16777216").is_err());
    }
}
