//! Disks and NICs whose queues are served by another process, over vhost-user.
//!
//! The VMM's part is small: it negotiates ([`session`]), hands over guest memory and the descriptors for kicks and interrupts, and keeps the
//! connection up ([`worker`]). [`blk`] and [`net`] know the features and configuration of their kind, [`device`] is the
//! virtio device that the guest sees.
//!
//! # Contract with backends
//! - Before the queues of a newly started driver are set up, every queue gets `GET_VRING_BASE` (stop): whatever the backend remembers of
//!   earlier requests in that queue, an in-flight record included, is void. Then `SET_VRING_BASE` 0.
//! - After a lost connection the same features, memory and queues are set up again **without** that stop, with `SET_VRING_BASE` at the index of the
//!   used ring. A backend that completes out of order keeps a record of requests in flight and resubmits what is in it.
//! - Every queue is then kicked once and its interrupt raised once, as either may have been lost with the old process.
//! - `GET_VRING_BASE` also when the driver resets the device; the answer means that the rings are not touched any more.
//! - While the guest moves, the backend marks each page in a shared record ([`log`]) after it has written to it, and before it answers
//!   `GET_VRING_BASE`. It gets the record while its queues run (`SET_LOG_BASE`, then `SET_FEATURES` with `VHOST_F_LOG_ALL`) or, after a lost
//!   connection, before they are set up; without that feature the record is not used any more.
//! - A changed device configuration (a grown disk) is seen at the next connection and passed on to the guest.

pub(crate) mod blk;
pub(crate) mod device;
pub(crate) mod log;
pub(crate) mod net;
pub(crate) mod session;
pub(crate) mod worker;

#[cfg(test)]
pub(crate) mod test_backend;
#[cfg(test)]
mod tests;

pub use session::SessionError;
