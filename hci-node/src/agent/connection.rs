//! One connection to an agent. Calls come one after the other; after one that was not answered in time, the next begins with a
//! synchronization, so that no answer is taken for another's.

use std::{path::Path, time::Duration};

use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    time::timeout,
};
use uuid::Uuid;

use super::{
    AgentFailure,
    protocol::{self, Command, Decoder},
};

/// An agent that does not answer a synchronization for so long is not there, or hangs.
const SYNC_DEADLINE: Duration = Duration::from_secs(5);
/// Read at a time.
const PIECE: usize = 16 << 10;

/// Whether the next answer belongs to the next command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sync {
    InStep,
    OutOfStep,
}

pub(super) struct Connection {
    stream: UnixStream,
    decoder: Decoder,
    sync: Sync,
}

impl Connection {
    /// Connects, and makes sure that an agent answers.
    pub(super) async fn open(path: &Path) -> Result<Self, AgentFailure> {
        let stream = UnixStream::connect(path).await.map_err(|_| AgentFailure::Away)?;
        let mut connection = Self { stream, decoder: Decoder::default(), sync: Sync::OutOfStep };
        connection.synchronize().await?;
        Ok(connection)
    }

    /// Has a command carried out and returns what the agent answers.
    pub(super) async fn call(
        &mut self,
        command: &Command<'_>,
        deadline: Duration,
    ) -> Result<Value, AgentFailure> {
        if self.sync == Sync::OutOfStep {
            self.synchronize().await?;
        }
        self.sync = Sync::OutOfStep;
        let exchanged = async {
            self.stream.write_all(&command.encode()).await.map_err(|_| AgentFailure::Away)?;
            self.line().await
        };
        let line = timeout(deadline, exchanged).await.map_err(|_| AgentFailure::Silent)??;
        let answer = protocol::answer(&line);
        if !matches!(answer, Err(AgentFailure::Nonsense(_))) {
            self.sync = Sync::InStep;
        }
        answer
    }

    async fn synchronize(&mut self) -> Result<(), AgentFailure> {
        let number = Uuid::new_v4().as_fields().0;
        let synchronized = async {
            self.stream.write_all(&protocol::synchronize(number)).await.map_err(|_| AgentFailure::Away)?;
            loop {
                self.decoder.skip_to_mark();
                let line = self.line().await?;
                // An earlier synchronization's answer may come first.
                if protocol::answer(&line).is_ok_and(|value| value.as_u64() == Some(number.into())) {
                    return Ok(());
                }
            }
        };
        timeout(SYNC_DEADLINE, synchronized).await.map_err(|_| AgentFailure::Silent)??;
        self.sync = Sync::InStep;
        Ok(())
    }

    /// The next line that the agent says.
    async fn line(&mut self) -> Result<Vec<u8>, AgentFailure> {
        let mut piece = [0; PIECE];
        loop {
            if let Some(line) = self.decoder.next()? {
                return Ok(line);
            }
            match self.stream.read(&mut piece).await {
                Ok(0) | Err(_) => return Err(AgentFailure::Away),
                Ok(length) => self.decoder.feed(&piece[..length]),
            }
        }
    }
}
