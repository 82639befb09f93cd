//! quinn's settings for each class of traffic.

use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::{digest, hmac};
use quinn::congestion::CubicConfig;
use quinn::{EndpointConfig, IdleTimeout, TransportConfig, VarInt};

use super::config::{Class, IDLE_TIMEOUT};
use crate::pki::Identity;
use crate::rpc::MAX_BULK;

/// Calls that a peer may have open at the same time; more wait at the caller.
const MAX_CONCURRENT_CALLS: u32 = 1024;
/// Round trip assumed before the first measurement. quinn's default of 333 ms is for the Internet and would make the
/// first retransmission wait for a second.
const INITIAL_RTT: Duration = Duration::from_millis(10);
/// Bytes in flight before the first loss is seen: on a LAN the window must never be the limit.
const INITIAL_WINDOW: u64 = 4 << 20;
/// One whole largest frame fits into a stream's window, so that it never waits for credit.
const STREAM_WINDOW: u32 = (MAX_BULK as u32) + (2 << 20);
/// Bounds the memory that one peer's unread data can hold.
const CONNECTION_WINDOW: u32 = 256 << 20;
/// Bounds the unacknowledged data that we keep for one peer.
const SEND_WINDOW: u64 = 64 << 20;
/// Guests' frames that wait for the consumer; more are dropped, as a switch would.
const DATAGRAM_RECEIVE_BUFFER: usize = 8 << 20;
/// Small, so that the sender is held back early and queues stay in the guest, where TCP sees them.
const DATAGRAM_SEND_BUFFER: usize = 512 << 10;

/// Settings of the connections of a class whose packets have up to `payload` bytes.
pub(super) fn transport(class: Class, payload: u16) -> TransportConfig {
    let mut congestion = CubicConfig::default();
    congestion.initial_window(INITIAL_WINDOW);
    let idle = VarInt::from_u32(IDLE_TIMEOUT.as_millis() as u32);
    let mut transport = TransportConfig::default();
    transport
        .max_idle_timeout(Some(IdleTimeout::from(idle)))
        .keep_alive_interval(Some(class.keep_alive()))
        .max_concurrent_bidi_streams(MAX_CONCURRENT_CALLS.into())
        .max_concurrent_uni_streams(0_u8.into())
        .stream_receive_window(STREAM_WINDOW.into())
        .receive_window(CONNECTION_WINDOW.into())
        .send_window(SEND_WINDOW)
        .initial_rtt(INITIAL_RTT)
        .congestion_controller_factory(Arc::new(congestion))
        // The link's MTU is known: start there, stay there, probe for nothing.
        .initial_mtu(payload)
        .min_mtu(payload)
        .mtu_discovery_config(None);
    match class {
        // First come, first served: an early write must not wait for the bulk of later ones.
        Class::Storage => transport.send_fairness(false),
        Class::Control | Class::Frames => &mut transport,
    };
    match class {
        Class::Frames => transport
            .datagram_receive_buffer_size(Some(DATAGRAM_RECEIVE_BUFFER))
            .datagram_send_buffer_size(DATAGRAM_SEND_BUFFER),
        Class::Control | Class::Storage => transport.datagram_receive_buffer_size(None),
    };
    transport
}

/// Settings of the endpoint. The key for stateless resets, and that of the connection ids, come from the node's own
/// key: a process that restarts can thereby tell peers at once that the connections of its predecessor are dead.
pub(super) fn endpoint(identity: &Identity, class: Class, payload: u16) -> EndpointConfig {
    let derive = |purpose: &str| {
        let mut context = digest::Context::new(&digest::SHA256);
        for part in [purpose.as_bytes(), class.alpn(), identity.key_pem().as_bytes()] {
            context.update(&(part.len() as u64).to_le_bytes());
            context.update(part);
        }
        context.finish()
    };
    let mut cid_key = [0; 8];
    cid_key.copy_from_slice(&derive("connection ids").as_ref()[..8]);
    let cid_key = u64::from_le_bytes(cid_key);
    let reset_key = hmac::Key::new(hmac::HMAC_SHA256, derive("stateless reset").as_ref());
    let mut config = EndpointConfig::new(Arc::new(reset_key));
    config.cid_generator(move || Box::new(quinn_proto::HashedConnectionIdGenerator::from_key(cid_key)));
    if config.max_udp_payload_size(payload).is_err() {
        // Refused below 1200 only, which `mtu::udp_payload` excludes.
        tracing::error!(payload, "QUIC refused the packet size");
    }
    config
}
