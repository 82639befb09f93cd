//! The control process' side of `data.sock`.

use std::{path::PathBuf, time::Duration};

use bytes::Bytes;
use netfabric::rpc::{CallError, Request, call_unix, codec};

use super::protocol::{
    Apply, CopyVolume, DataCall, DataConfig, DataInstance, Observed, VolumeFlush, VolumeRead, VolumeWrite,
};

/// For calls that only look or hand something over.
pub const QUICK: Duration = Duration::from_secs(5);
/// For calls that wait for disks, here or on other nodes.
pub const SLOW: Duration = Duration::from_secs(60);

/// Calls the data process of this node. Cheap to clone; each call is a connection of its own.
#[derive(Clone, Debug)]
pub struct DataClient {
    socket: PathBuf,
}

impl DataClient {
    /// A client for the data process that serves this socket.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into() }
    }

    /// Makes a call without bulk data.
    pub async fn call<C: DataCall>(&self, call: &C, deadline: Duration) -> Result<C::Reply, CallError> {
        Ok(self.exchange(call, Bytes::new(), deadline).await?.0)
    }

    /// Hands a configuration to that instance of the data process.
    pub async fn apply(&self, instance: DataInstance, config: &DataConfig) -> Result<Observed, CallError> {
        let bulk = codec::encode(config)?;
        Ok(self.exchange(&Apply { instance }, bulk, SLOW).await?.0)
    }

    /// Reads from a volume that is open with internal access.
    pub async fn read(&self, range: VolumeRead) -> Result<Bytes, CallError> {
        Ok(self.exchange(&range, Bytes::new(), SLOW).await?.1)
    }

    /// Writes to a volume that is open with internal access.
    pub async fn write(&self, to: VolumeWrite, data: Bytes) -> Result<(), CallError> {
        self.exchange(&to, data, SLOW).await.map(|((), _)| ())
    }

    /// Makes all earlier writes to a volume durable.
    pub async fn flush(&self, volume: VolumeFlush) -> Result<(), CallError> {
        self.call(&volume, SLOW).await
    }

    /// Copies a range between two volumes.
    pub async fn copy(&self, range: CopyVolume) -> Result<u64, CallError> {
        self.call(&range, SLOW).await
    }

    async fn exchange<C: DataCall>(
        &self,
        call: &C,
        bulk: Bytes,
        deadline: Duration,
    ) -> Result<(C::Reply, Bytes), CallError> {
        let request = Request::new(C::METHOD, call)?.with_bulk(bulk);
        let response = call_unix(&self.socket, request, deadline).await?;
        Ok((response.decode()?, response.bulk))
    }
}
