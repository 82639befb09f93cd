//! Typed headers: one version byte, then postcard.
//!
//! postcard is not self-describing, so messages evolve by rule: fields of a struct never change within a version,
//! enums grow at the end. A change that breaks this raises [`VERSION`].

use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Version of all message types of this build.
pub const VERSION: u8 = 1;

/// Room for the headers that there are many of: they grow once, not five times.
const USUAL: usize = 160;

/// A value that cannot be encoded.
#[derive(Debug, thiserror::Error)]
#[error("cannot encode a message: {0}")]
pub struct EncodeError(#[from] postcard::Error);

/// Bytes that are not a message.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// No bytes at all.
    #[error("empty message")]
    Empty,
    /// The peer speaks another version.
    #[error("message version {0} is not the {VERSION} that this build speaks")]
    Version(u8),
    /// The version is ours and the bytes are not.
    #[error("malformed message: {0}")]
    Malformed(postcard::Error),
    /// A whole message, and then more.
    #[error("{0} bytes after the end of the message")]
    Trailing(usize),
}

/// Encodes a value behind the version byte.
pub fn encode<T: Serialize>(value: &T) -> Result<Bytes, EncodeError> {
    let mut bytes = Vec::with_capacity(USUAL);
    bytes.push(VERSION);
    Ok(postcard::to_extend(value, bytes)?.into())
}

/// Decodes what [`encode`] made; all bytes must be used.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, DecodeError> {
    let (version, body) = bytes.split_first().ok_or(DecodeError::Empty)?;
    if *version != VERSION {
        return Err(DecodeError::Version(*version));
    }
    let (value, rest) = postcard::take_from_bytes(body).map_err(DecodeError::Malformed)?;
    if rest.is_empty() { Ok(value) } else { Err(DecodeError::Trailing(rest.len())) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    type Sample = (u64, String, Option<Vec<u32>>);

    proptest! {
        #[test]
        fn values_round_trip(value: Sample) {
            prop_assert_eq!(decode::<Sample>(&encode(&value).unwrap()).unwrap(), value);
        }

        #[test]
        fn any_bytes_are_a_value_or_an_error(bytes: Vec<u8>) {
            let _ = decode::<Sample>(&bytes);
        }
    }

    #[test]
    fn other_versions_and_trailing_bytes_are_refused() {
        let mut bytes = encode(&7_u32).unwrap().to_vec();
        bytes.push(0);
        assert!(matches!(decode::<u32>(&bytes), Err(DecodeError::Trailing(1))));
        bytes[0] = VERSION + 1;
        assert!(matches!(decode::<u32>(&bytes), Err(DecodeError::Version(_))));
        assert!(matches!(decode::<u32>(&[]), Err(DecodeError::Empty)));
    }
}
