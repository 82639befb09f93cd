//! AES-256-XTS on sectors of a block, through the assembler of AWS-LC, which has no safe interface for it.
//!
//! IEEE 1619: each sector is encrypted by itself, with its number on the disk as tweak. The ciphertext is as long as the plaintext; that it is the right one is for the store's checksums to
//! tell.

use crate::ids::BLOCK_SIZE;
use crate::key::DiskKey;
use aws_lc_sys::{
    EVP_CIPHER_CTX, EVP_CIPHER_CTX_free, EVP_CIPHER_CTX_new, EVP_CipherInit_ex, EVP_CipherUpdate,
    EVP_aes_256_xts,
};
use parking_lot::Mutex;
use std::io;
use std::ptr::{NonNull, null, null_mut};

/// Which way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Direction {
    Decrypt = 0,
    Encrypt = 1,
}

/// A context with its key set.
struct Context(NonNull<EVP_CIPHER_CTX>);

// SAFETY: a context is plain memory without ties to a thread; it is used by one thread at a time, which its mutex sees to.
unsafe impl Send for Context {}

impl Context {
    fn new(key: &DiskKey, direction: Direction) -> io::Result<Self> {
        // SAFETY: takes nothing; a null result is looked at.
        let context = NonNull::new(unsafe { EVP_CIPHER_CTX_new() }).map(Self);
        let context = context.ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
        let bytes = key.bytes();
        // SAFETY: the context is valid; AES-256-XTS reads 64 bytes of key, which `bytes` has; without an IV none is read.
        let set = unsafe {
            EVP_CipherInit_ex(
                context.0.as_ptr(),
                EVP_aes_256_xts(),
                null_mut(),
                bytes.as_ptr(),
                null(),
                direction as i32,
            )
        };
        // It refuses two equal halves.
        if set == 1 { Ok(context) } else { Err(io::Error::other("the key of the disk cannot be used")) }
    }

    fn run(&mut self, sector: u64, bytes: &mut [u8]) -> io::Result<()> {
        let mut tweak = [0; 16];
        tweak[..8].copy_from_slice(&sector.to_le_bytes());
        let length = i32::try_from(bytes.len()).map_err(io::Error::other)?;
        let mut written = 0;
        // SAFETY: the context is valid and has its key; the tweak is 16 bytes, as long as an IV of this cipher.
        let set =
            unsafe { EVP_CipherInit_ex(self.0.as_ptr(), null(), null_mut(), null(), tweak.as_ptr(), -1) };
        // SAFETY: input and output are the same `length` bytes, which this cipher allows; it writes as many as it reads.
        let run = unsafe {
            EVP_CipherUpdate(self.0.as_ptr(), bytes.as_mut_ptr(), &raw mut written, bytes.as_ptr(), length)
        };
        if set == 1 && run == 1 && written == length {
            Ok(())
        } else {
            Err(io::Error::other("a sector could not be encrypted or decrypted"))
        }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: made by EVP_CIPHER_CTX_new, and freed once. It erases the key.
        unsafe { EVP_CIPHER_CTX_free(self.0.as_ptr()) }
    }
}

/// The cipher of one disk.
pub(super) struct Xts {
    encrypt: Mutex<Context>,
    decrypt: Mutex<Context>,
}

impl Xts {
    pub(super) fn new(key: &DiskKey) -> io::Result<Self> {
        Ok(Self {
            encrypt: Mutex::new(Context::new(key, Direction::Encrypt)?),
            decrypt: Mutex::new(Context::new(key, Direction::Decrypt)?),
        })
    }

    /// Encrypts whole sectors in place, which lie from this one on.
    pub(super) fn encrypt(&self, first: u64, bytes: &mut [u8]) -> io::Result<()> {
        run(&self.encrypt, first, bytes)
    }

    /// Decrypts whole sectors in place, which lie from this one on.
    pub(super) fn decrypt(&self, first: u64, bytes: &mut [u8]) -> io::Result<()> {
        run(&self.decrypt, first, bytes)
    }
}

fn run(context: &Mutex<Context>, first: u64, bytes: &mut [u8]) -> io::Result<()> {
    let mut context = context.lock();
    let mut sectors = bytes.chunks_mut(BLOCK_SIZE as usize).enumerate();
    sectors.try_for_each(|(i, bytes)| context.run(first.wrapping_add(i as u64), bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// IEEE 1619-2018, vector 10: AES-256, data unit 0xff, 512 bytes of 00, 01 … ff twice.
    #[test]
    fn it_is_the_standards_xts() {
        let key = hex(concat!(
            "2718281828459045235360287471352662497757247093699959574966967627",
            "3141592653589793238462643383279502884197169399375105820974944592",
        ));
        let xts = Xts::new(&DiskKey::from_bytes(&key).unwrap()).unwrap();
        let plain: Vec<u8> = (0..512_u32).map(|byte| byte as u8).collect();
        let mut bytes = plain.clone();
        xts.encrypt(0xff, &mut bytes).unwrap();
        assert_eq!(bytes[..16], hex("1c3b3a102f770386e4836c99e370cf9b")[..]);
        xts.decrypt(0xff, &mut bytes).unwrap();
        assert_eq!(bytes, plain);
    }

    #[test]
    fn equal_halves_are_no_key() {
        assert!(Xts::new(&DiskKey::from_bytes(&[7; 64]).unwrap()).is_err());
    }

    fn hex(text: &str) -> Vec<u8> {
        (0..text.len()).step_by(2).map(|i| u8::from_str_radix(&text[i..i + 2], 16).unwrap()).collect()
    }
}
