//! Whether a variable store can be used: the header of its firmware volume (UEFI PI 1.7, volume 3, 3.2.1). The variables behind it are the
//! firmware's to check, which it does at each start.

use thiserror::Error;

const SIGNATURE: &[u8] = b"_FVH";
const SIGNATURE_AT: usize = 0x28;
const LENGTH_AT: usize = 0x20;
const HEADER_LENGTH_AT: usize = 0x30;

/// What is wrong with it.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub(crate) enum VariableStoreError {
    #[error("it has {0} bytes, the firmware's template {1}")]
    Size(usize, usize),
    #[error("it does not begin with a firmware volume")]
    Signature,
    #[error("the header of its firmware volume is damaged")]
    Header,
}

/// Checks a store that belongs to firmware with this template.
pub(crate) fn check(content: &[u8], template: &[u8]) -> Result<(), VariableStoreError> {
    if content.len() != template.len() {
        return Err(VariableStoreError::Size(content.len(), template.len()));
    }
    if content.get(SIGNATURE_AT..SIGNATURE_AT + SIGNATURE.len()) != Some(SIGNATURE) {
        return Err(VariableStoreError::Signature);
    }
    let header_len =
        content.get(HEADER_LENGTH_AT..HEADER_LENGTH_AT + 2).map(|len| u16::from_le_bytes([len[0], len[1]]));
    let header = header_len
        .filter(|len| usize::from(*len) > HEADER_LENGTH_AT && len.is_multiple_of(2))
        .and_then(|len| content.get(..usize::from(len)))
        .ok_or(VariableStoreError::Header)?;
    let sum = header
        .chunks_exact(2)
        .fold(0u16, |sum, word| sum.wrapping_add(u16::from_le_bytes([word[0], word[1]])));
    let mut len = [0; 8];
    len.copy_from_slice(&header[LENGTH_AT..LENGTH_AT + 8]);
    if sum != 0 || u64::from_le_bytes(len) > content.len() as u64 {
        return Err(VariableStoreError::Header);
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A store without variables.
    pub(in super::super) fn blank(len: usize) -> Vec<u8> {
        let mut store = vec![0; len];
        store[LENGTH_AT..LENGTH_AT + 8].copy_from_slice(&(len as u64).to_le_bytes());
        store[SIGNATURE_AT..SIGNATURE_AT + 4].copy_from_slice(SIGNATURE);
        store[HEADER_LENGTH_AT..HEADER_LENGTH_AT + 2].copy_from_slice(&0x48u16.to_le_bytes());
        let sum = store[..0x48]
            .chunks(2)
            .fold(0u16, |sum, word| sum.wrapping_sub(u16::from_le_bytes([word[0], word[1]])));
        store[0x32..0x34].copy_from_slice(&sum.to_le_bytes());
        store
    }

    #[test]
    fn damage_is_named() {
        let good = blank(0x1000);
        assert_eq!(check(&good, &good), Ok(()));
        assert_eq!(check(&good[1..], &good), Err(VariableStoreError::Size(0xfff, 0x1000)));
        assert_eq!(check(&[0; 0x1000], &good), Err(VariableStoreError::Signature));
        for at in [0x10, 0x20, 0x30, 0x31, 0x40] {
            let mut bad = good.clone();
            bad[at] ^= 0x11;
            assert_eq!(check(&bad, &good), Err(VariableStoreError::Header), "{at:#x}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_store_or_an_error(mut bytes in prop::collection::vec(any::<u8>(), 0..200), marked in any::<bool>()) {
            if marked && bytes.len() >= SIGNATURE_AT + 4 {
                bytes[SIGNATURE_AT..SIGNATURE_AT + 4].copy_from_slice(SIGNATURE);
            }
            let _ = check(&bytes, &bytes);
        }
    }
}
