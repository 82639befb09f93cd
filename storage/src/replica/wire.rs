//! Replica messages as bytes: a postcard header (versioned by the RPC layer) and the data, raw.

use super::protocol::{
    AckWhen, BootEpoch, PowerEpoch, ReplicaAddress, ReplicaError, ReplicaOp, ReplicaOutcome, ReplicaReply,
    ReplicaRequest, Session,
};
use crate::ids::{DiskId, Generation, LayerRef, SegmentIndex, Version, VolumeId};
use crate::store::{BlockVersion, Compression, DamagedBlocks, Keep, ReadReply, ReplicaWrite, WriteContent};
use bytes::Bytes;
use netfabric::rpc::{DecodeError, EncodeError, Request, Response};
use serde::{Deserialize, Serialize};

/// Method number of all replica requests.
pub(crate) const METHOD: u16 = 0x0201;

#[derive(Serialize, Deserialize)]
struct RequestHeader {
    volume: VolumeId,
    generation: Generation,
    session: Session,
    op: Op,
}

/// Append only: the order is the wire format.
#[derive(Serialize, Deserialize)]
enum Op {
    Attach {
        disk: DiskId,
    },
    WriteData {
        at: ReplicaAddress,
        block: u32,
        version: Version,
        crcs: Vec<u32>,
        ack: AckWhen,
        compression: Compression,
    },
    WriteZeroes {
        at: ReplicaAddress,
        block: u32,
        version: Version,
        blocks: u32,
        keep: Keep,
        ack: AckWhen,
    },
    Read {
        at: ReplicaAddress,
        below: Vec<LayerRef>,
        block: u32,
        blocks: u32,
    },
    Versions {
        at: ReplicaAddress,
        block: u32,
        blocks: u32,
    },
    Flush {
        disk: DiskId,
    },
    Merge {
        at: ReplicaAddress,
        into: LayerRef,
        block: u32,
        blocks: u32,
        keep: Keep,
        compression: Compression,
    },
    Damaged {
        disk: DiskId,
        layers: Vec<LayerRef>,
        skip: u32,
    },
    Stored {
        disk: DiskId,
        layer: LayerRef,
        first: SegmentIndex,
        count: u32,
    },
}

#[derive(Serialize, Deserialize)]
struct ReplyHeader {
    boot: BootEpoch,
    served_us: u32,
    result: Result<Outcome, ReplicaError>,
}

/// Append only: the order is the wire format.
#[derive(Serialize, Deserialize)]
enum Outcome {
    Attached { previous: Generation, power: PowerEpoch },
    Done,
    Data { crcs: Vec<u32> },
    Versions(Vec<BlockVersion>),
    Damaged(Vec<DamagedBlocks>),
    Stored(Vec<SegmentIndex>),
}

pub(crate) fn encode_request(request: ReplicaRequest) -> Result<Request, EncodeError> {
    let mut bulk = Bytes::new();
    let op = match request.op {
        ReplicaOp::Attach { disk } => Op::Attach { disk },
        ReplicaOp::Write { at, write, ack } => match write.content {
            WriteContent::Data { data, crcs } => {
                bulk = data;
                let ReplicaWrite { block, version, compression, .. } = write;
                Op::WriteData { at, block, version, crcs, ack, compression }
            }
            WriteContent::Zeroes { blocks, keep } => {
                Op::WriteZeroes { at, block: write.block, version: write.version, blocks, keep, ack }
            }
        },
        ReplicaOp::Read { at, below, block, blocks } => Op::Read { at, below: below.to_vec(), block, blocks },
        ReplicaOp::Merge { at, into, block, blocks, keep, compression } => {
            Op::Merge { at, into, block, blocks, keep, compression }
        }
        ReplicaOp::Versions { at, block, blocks } => Op::Versions { at, block, blocks },
        ReplicaOp::Flush { disk } => Op::Flush { disk },
        ReplicaOp::Stored { disk, layer, first, count } => Op::Stored { disk, layer, first, count },
        ReplicaOp::Damaged { disk, layers, skip } => Op::Damaged { disk, layers: layers.to_vec(), skip },
    };
    let header = RequestHeader {
        volume: request.volume,
        generation: request.generation,
        session: request.session,
        op,
    };
    Ok(Request::new(METHOD, &header)?.with_bulk(bulk))
}

pub(crate) fn decode_request(request: &Request) -> Result<ReplicaRequest, DecodeError> {
    let header: RequestHeader = request.decode()?;
    let op = match header.op {
        Op::Attach { disk } => ReplicaOp::Attach { disk },
        Op::WriteData { at, block, version, crcs, ack, compression } => {
            let content = WriteContent::Data { data: request.bulk.clone(), crcs };
            ReplicaOp::Write { at, write: ReplicaWrite { block, version, content, compression }, ack }
        }
        Op::WriteZeroes { at, block, version, blocks, keep, ack } => {
            let content = WriteContent::Zeroes { blocks, keep };
            let compression = Compression::Off;
            ReplicaOp::Write { at, write: ReplicaWrite { block, version, content, compression }, ack }
        }
        Op::Read { at, below, block, blocks } => ReplicaOp::Read { at, below: below.into(), block, blocks },
        Op::Merge { at, into, block, blocks, keep, compression } => {
            ReplicaOp::Merge { at, into, block, blocks, keep, compression }
        }
        Op::Versions { at, block, blocks } => ReplicaOp::Versions { at, block, blocks },
        Op::Flush { disk } => ReplicaOp::Flush { disk },
        Op::Stored { disk, layer, first, count } => ReplicaOp::Stored { disk, layer, first, count },
        Op::Damaged { disk, layers, skip } => ReplicaOp::Damaged { disk, layers: layers.into(), skip },
    };
    Ok(ReplicaRequest { volume: header.volume, generation: header.generation, session: header.session, op })
}

pub(crate) fn encode_reply(reply: ReplicaReply) -> Result<Response, EncodeError> {
    let mut bulk = Bytes::new();
    let result = reply.result.map(|outcome| match outcome {
        ReplicaOutcome::Attached { previous, power } => Outcome::Attached { previous, power },
        ReplicaOutcome::Done => Outcome::Done,
        ReplicaOutcome::Data(read) => {
            bulk = read.data;
            Outcome::Data { crcs: read.crcs }
        }
        ReplicaOutcome::Versions(versions) => Outcome::Versions(versions),
        ReplicaOutcome::Damaged(runs) => Outcome::Damaged(runs),
        ReplicaOutcome::Stored(segments) => Outcome::Stored(segments),
    });
    Ok(Response::new(&ReplyHeader { boot: reply.boot, served_us: reply.served_us, result })?.with_bulk(bulk))
}

pub(crate) fn decode_reply(response: &Response) -> Result<ReplicaReply, DecodeError> {
    let header: ReplyHeader = response.decode()?;
    let result = header.result.map(|outcome| match outcome {
        Outcome::Attached { previous, power } => ReplicaOutcome::Attached { previous, power },
        Outcome::Done => ReplicaOutcome::Done,
        Outcome::Data { crcs } => ReplicaOutcome::Data(ReadReply { data: response.bulk.clone(), crcs }),
        Outcome::Versions(versions) => ReplicaOutcome::Versions(versions),
        Outcome::Damaged(runs) => ReplicaOutcome::Damaged(runs),
        Outcome::Stored(segments) => ReplicaOutcome::Stored(segments),
    });
    Ok(ReplicaReply { boot: header.boot, served_us: header.served_us, result })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{LayerId, SegmentKey};
    use proptest::prelude::*;

    fn at() -> impl Strategy<Value = ReplicaAddress> {
        (any::<u128>(), any::<u32>()).prop_map(|(d, s)| ReplicaAddress {
            disk: DiskId(uuid::Uuid::from_u128(d)),
            segment: SegmentIndex(s),
            layer: layer(u128::from(s) << 7, s),
        })
    }

    fn layer(volume: u128, layer: u32) -> LayerRef {
        LayerRef { volume: VolumeId(uuid::Uuid::from_u128(volume)), layer: LayerId(layer) }
    }

    fn op() -> impl Strategy<Value = ReplicaOp> {
        let ack = prop_oneof![Just(AckWhen::Logged), Just(AckWhen::Durable)];
        let keep = prop_oneof![Just(Keep::WhereStored), Just(Keep::Always)];
        let content = prop_oneof![
            (proptest::collection::vec(any::<u8>(), 0..300), proptest::collection::vec(any::<u32>(), 0..9))
                .prop_map(|(data, crcs)| WriteContent::Data { data: data.into(), crcs }),
            (any::<u32>(), keep).prop_map(|(blocks, keep)| WriteContent::Zeroes { blocks, keep }),
        ];
        let write = (any::<u32>(), any::<u64>(), any::<u64>(), content).prop_map(|(block, g, s, content)| {
            // Of zeroes there is nothing to compress, and nothing is said.
            let compression = match content {
                WriteContent::Data { .. } if s % 2 == 0 => Compression::Lz4,
                _ => Compression::Off,
            };
            ReplicaWrite { block, version: Version { generation: g, sequence: s }, content, compression }
        });
        prop_oneof![
            at().prop_map(|a| ReplicaOp::Attach { disk: a.disk }),
            at().prop_map(|a| ReplicaOp::Flush { disk: a.disk }),
            (at(), any::<u32>()).prop_map(|(a, skip)| ReplicaOp::Damaged {
                disk: a.disk,
                layers: [a.layer, a.layer].into(),
                skip
            }),
            (at(), write, ack).prop_map(|(at, write, ack)| ReplicaOp::Write { at, write, ack }),
            (
                at(),
                proptest::collection::vec((any::<u128>(), any::<u32>()), 0..5),
                any::<u32>(),
                any::<u32>()
            )
                .prop_map(|(at, below, block, blocks)| ReplicaOp::Read {
                    at,
                    below: below.into_iter().map(|(volume, number)| layer(volume, number)).collect(),
                    block,
                    blocks
                }),
            (at(), any::<u128>(), any::<u32>(), any::<u32>()).prop_map(|(at, volume, block, blocks)| {
                let into = layer(volume, block);
                let compression = if block % 2 == 0 { Compression::Lz4 } else { Compression::Off };
                ReplicaOp::Merge { at, into, block, blocks, keep: Keep::Always, compression }
            }),
            (at(), any::<u32>()).prop_map(|(at, count)| ReplicaOp::Stored {
                disk: at.disk,
                layer: at.layer,
                first: at.segment,
                count
            }),
            (at(), any::<u32>(), any::<u32>()).prop_map(|(at, block, blocks)| ReplicaOp::Versions {
                at,
                block,
                blocks
            }),
        ]
    }

    proptest! {
        #[test]
        fn requests_survive_the_wire(op in op(), generation: u64, boot: u64, number: u64, volume: u128) {
            let request = ReplicaRequest {
                volume: VolumeId(uuid::Uuid::from_u128(volume)),
                generation: Generation(generation),
                session: Session { boot: BootEpoch(boot), number },
                op,
            };
            let wire = encode_request(request.clone()).unwrap();
            prop_assert_eq!(decode_request(&wire).unwrap(), request);
        }

        #[test]
        fn garbage_is_an_error_not_a_panic(header: Vec<u8>, bulk: Vec<u8>) {
            let request = Request { method: METHOD, header: header.clone().into(), bulk: bulk.clone().into() };
            let _ = decode_request(&request);
            let _ = decode_reply(&Response { header: header.into(), bulk: bulk.into() });
        }

        #[test]
        fn a_message_changed_on_its_way_is_an_error_or_another_message(
            op in op(),
            changes in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..6),
            cut in proptest::option::of(any::<proptest::sample::Index>()),
        ) {
            let request = ReplicaRequest {
                volume: VolumeId::default(),
                generation: Generation(1),
                session: Session { boot: BootEpoch(1), number: 1 },
                op,
            };
            let Request { method, header, bulk } = encode_request(request).unwrap();
            let mut header = header.to_vec();
            for (at, byte) in changes {
                let at = at.index(header.len());
                header[at] ^= byte;
            }
            if let Some(cut) = cut {
                header.truncate(cut.index(header.len()));
            }
            let _ = decode_reply(&Response { header: header.clone().into(), bulk: bulk.clone() });
            // Whether its data and checksums agree is for the store to say, which refuses the write.
            let _ = decode_request(&Request { method, header: header.into(), bulk });
        }

        #[test]
        fn replies_survive_the_wire(boot: u64, blocks in proptest::collection::vec((any::<u32>(), any::<u64>(), any::<u32>()), 0..50), data: Vec<u8>) {
            let versions = blocks.iter().map(|(block, s, crc)| BlockVersion {
                block: *block, version: Version { generation: 1, sequence: *s }, crc: *crc }).collect();
            let damaged = blocks.iter().map(|(block, _, end)| DamagedBlocks {
                at: SegmentKey { volume: VolumeId::default(), segment: SegmentIndex(*end), layer: LayerId(*block) },
                blocks: *block..*end,
            }).collect();
            for result in [
                Ok(ReplicaOutcome::Damaged(damaged)),
                Ok(ReplicaOutcome::Stored(blocks.iter().map(|(block, _, _)| SegmentIndex(*block)).collect())),
                Ok(ReplicaOutcome::Versions(versions)),
                Ok(ReplicaOutcome::Data(ReadReply { data: data.clone().into(), crcs: vec![1, 2] })),
                Ok(ReplicaOutcome::Attached { previous: Generation(boot), power: PowerEpoch(uuid::Uuid::from_u128(boot.into())) }),
                Err(ReplicaError::Fenced { current: Generation(7) }),
            ] {
                let reply = ReplicaReply { boot: BootEpoch(boot), served_us: boot as u32, result };
                prop_assert_eq!(decode_reply(&encode_reply(reply.clone()).unwrap()).unwrap(), reply);
            }
        }
    }
}
