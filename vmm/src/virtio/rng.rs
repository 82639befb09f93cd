//! virtio-rng: fills the guest's buffers with random bytes from this host's kernel, on a thread of its own.

use vm_memory::{Bytes, GuestAddress};

use super::device::{ActivateError, Activation, DeviceType, VirtioDevice};
use super::local::{Chain, RING_FEATURES, Ring, Worker};
use crate::memory::Memory;

const QUEUE_SIZE: u16 = 64;
/// Most bytes for one request, however long its buffers are: a guest cannot keep the thread busy with one.
const MAX_REQUEST: usize = 64 << 10;

/// The device.
#[derive(Default)]
pub(crate) struct Rng {
    worker: Option<Worker>,
}

impl VirtioDevice for Rng {
    fn id(&self) -> &str {
        "rng"
    }

    fn device_type(&self) -> DeviceType {
        DeviceType::Rng
    }

    fn features(&self) -> u64 {
        RING_FEATURES
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { features, memory, queues, start } = activation;
        let Some(active) = queues.into_iter().next() else { return Ok(()) };
        let ring = Ring::new(active, features, memory.clone(), start)?;
        self.worker = Some(Worker::spawn_single("rng", ring, memory, fill_chain)?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

fn fill_chain(memory: &mut Memory, chain: Chain<'_>) -> u32 {
    let mut filled = 0usize;
    for descriptor in chain.writable() {
        let len = (descriptor.len() as usize).min(MAX_REQUEST - filled);
        filled += fill(memory, descriptor.addr(), len);
        if filled == MAX_REQUEST {
            break;
        }
    }
    filled as u32
}

/// Fills guest memory and returns how many bytes were; fewer where the guest points outside its memory.
fn fill(memory: &Memory, at: GuestAddress, len: usize) -> usize {
    let mut done = 0;
    let mut random = [0u8; 256];
    while done < len {
        let want = (len - done).min(random.len());
        // SAFETY: the buffer has `want` bytes; requests of up to 256 bytes are never cut short.
        let got = unsafe { libc::getrandom(random.as_mut_ptr().cast(), want, 0) };
        let Ok(got) = usize::try_from(got) else { break };
        let Some(target) = at.0.checked_add(done as u64) else { break };
        if memory.write_slice(&random[..got], GuestAddress(target)).is_err() {
            break;
        }
        done += got;
    }
    done
}
