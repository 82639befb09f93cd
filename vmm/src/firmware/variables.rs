//! Whether a variable store can be used: the header of its firmware volume (UEFI PI 1.7, volume 3, 3.2.1) and behind it the one of the
//! store itself (`VARIABLE_STORE_HEADER` of edk2's MdeModulePkg). With the first one damaged OVMF begins anew, with the second one it does
//! not start. The variables behind them are the firmware's to check, which it does at each start.

use thiserror::Error;

const SIGNATURE: &[u8] = b"_FVH";
const SIGNATURE_AT: usize = 0x28;
const LENGTH_AT: usize = 0x20;
const HEADER_LENGTH_AT: usize = 0x30;
/// The store's header: what kind of store it is (a GUID), its size with the header, and two bytes that say that it was formatted and is
/// healthy. More follows, which means nothing.
const STORE_SIZE_AT: usize = 16;
const STORE_STATE_AT: usize = 20;
const STORE_STATE: [u8; 2] = [0x5a, 0xfe];
const STORE_HEADER_CHECKED: usize = 22;
const STORE_HEADER: usize = 28;

/// What is wrong with it.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub(crate) enum VariableStoreError {
    #[error("it has {0} bytes, the firmware's template {1}")]
    Size(usize, usize),
    #[error("it does not begin with a firmware volume")]
    Signature,
    #[error("the header of its firmware volume is damaged")]
    Header,
    #[error("the header of its variables is damaged, or not of the kind and size of the firmware's template")]
    Store,
}

/// Checks a store that belongs to firmware with this template.
pub(crate) fn check(content: &[u8], template: &[u8]) -> Result<(), VariableStoreError> {
    if content.len() != template.len() {
        return Err(VariableStoreError::Size(content.len(), template.len()));
    }
    let header = store_header(content)?;
    if header != store_header(template)? {
        return Err(VariableStoreError::Store);
    }
    Ok(())
}

/// The part of the store's header that stays the same as long as the store lives.
fn store_header(content: &[u8]) -> Result<&[u8], VariableStoreError> {
    let volume = volume(content)?;
    let header = volume.get(..STORE_HEADER).ok_or(VariableStoreError::Store)?;
    let mut size = [0; 4];
    size.copy_from_slice(&header[STORE_SIZE_AT..STORE_STATE_AT]);
    let is_inside = (STORE_HEADER..=volume.len()).contains(&(u32::from_le_bytes(size) as usize));
    if !is_inside || header[STORE_STATE_AT..STORE_HEADER_CHECKED] != STORE_STATE {
        return Err(VariableStoreError::Store);
    }
    Ok(&header[..STORE_HEADER_CHECKED])
}

/// What is in the firmware volume, behind its header.
fn volume(content: &[u8]) -> Result<&[u8], VariableStoreError> {
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
    if sum != 0 {
        return Err(VariableStoreError::Header);
    }
    let mut len = [0; 8];
    len.copy_from_slice(&header[LENGTH_AT..LENGTH_AT + 8]);
    usize::try_from(u64::from_le_bytes(len))
        .ok()
        .and_then(|len| content.get(header.len()..len))
        .ok_or(VariableStoreError::Header)
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
        let (header, size) = (0x48, len as u32 / 2);
        store[header + STORE_SIZE_AT..][..4].copy_from_slice(&size.to_le_bytes());
        store[header + STORE_STATE_AT..][..2].copy_from_slice(&STORE_STATE);
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
        for at in [0x48, 0x57, 0x58, 0x5b, 0x5c, 0x5d] {
            let mut bad = good.clone();
            bad[at] ^= 0x11;
            assert_eq!(check(&bad, &good), Err(VariableStoreError::Store), "{at:#x}");
        }
        let mut used = good.clone();
        used[0x48 + STORE_HEADER..].fill(0xff);
        assert_eq!(check(&used, &good), Ok(()), "variables are the firmware's");
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_store_or_an_error(mut bytes in prop::collection::vec(any::<u8>(), 0..200), marked in any::<bool>()) {
            if marked && bytes.len() >= SIGNATURE_AT + 4 {
                bytes[SIGNATURE_AT..SIGNATURE_AT + 4].copy_from_slice(SIGNATURE);
            }
            let _ = check(&bytes, &bytes);
        }

        #[test]
        fn any_volume_with_a_sound_sum_is_a_store_or_an_error(len in 0x60usize..400, volume_len in any::<u64>(), header_len in 0u16..400, tail in prop::collection::vec(any::<u8>(), 24)) {
            let mut bytes = blank(len);
            bytes[LENGTH_AT..LENGTH_AT + 8].copy_from_slice(&volume_len.to_le_bytes());
            bytes[HEADER_LENGTH_AT..HEADER_LENGTH_AT + 2].copy_from_slice(&header_len.to_le_bytes());
            let end = len.min(0x48 + tail.len());
            bytes[0x48..end].copy_from_slice(&tail[..end - 0x48]);
            let summed = usize::from(header_len).min(len) / 2 * 2;
            let sum = bytes[..summed].chunks(2).fold(0u16, |sum, word| sum.wrapping_add(u16::from_le_bytes([word[0], word[1]])));
            let old = u16::from_le_bytes([bytes[0x32], bytes[0x33]]);
            bytes[0x32..0x34].copy_from_slice(&old.wrapping_sub(sum).to_le_bytes());
            let _ = check(&bytes, &blank(len));
            let _ = check(&bytes, &bytes);
        }
    }
}
