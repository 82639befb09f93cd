//! A vhost-user-blk target over one file, to be killed by tests.
//!
//! `blk-target SOCKET RECORD FILE JOURNAL QUEUES HOLD`: every request that is executed is noted in the journal (a line: kind and
//! offset in blocks); after HOLD writes, writes are noted as held and neither executed nor answered. Requests are executed in
//! order by two threads, so that answers come out of order.

use anyhow::{Context, Result};
use bytes::Bytes;
use parking_lot::Mutex;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use storage::BusyPoll;
use storage::device::{BlockDevice, BlockError, BlockOp, Completion};
use storage::target::{Access, Target, TargetOptions};

struct FileDevice {
    size: u64,
    work: SyncSender<(BlockOp, Completion)>,
}

struct Worker {
    device: File,
    journal: Mutex<(File, u64)>,
    hold: u64,
    held: Mutex<Vec<Completion>>,
}

impl BlockDevice for FileDevice {
    fn size(&self) -> u64 {
        self.size
    }

    fn submit(&self, op: BlockOp, done: Completion) {
        // Without workers it is dropped, and stays in flight.
        let _ = self.work.send((op, done));
    }
}

impl Worker {
    fn run(&self, work: &Mutex<Receiver<(BlockOp, Completion)>>) {
        loop {
            let (op, done, held) = {
                // Taken and noted under one lock: the journal has the order of submission.
                let work = work.lock();
                let Ok((op, done)) = work.recv() else { return };
                let held = self.note(&op).unwrap_or(true);
                (op, done, held)
            };
            if held {
                self.held.lock().push(done);
            } else {
                done(self.execute(&op).map_err(|e| BlockError::Io(e.to_string())));
            }
        }
    }

    fn note(&self, op: &BlockOp) -> std::io::Result<bool> {
        let mut journal = self.journal.lock();
        let (kind, offset) = match op {
            BlockOp::Read { .. } => return Ok(false),
            BlockOp::Flush => ("flush", 0),
            BlockOp::Write { offset, .. } => ("write", *offset),
            BlockOp::Discard { offset, .. } | BlockOp::WriteZeroes { offset, .. } => ("zero", *offset),
        };
        let held = kind == "write" && journal.1 >= self.hold;
        journal.1 += u64::from(kind == "write");
        let note = if held { "held" } else { kind };
        journal.0.write_all(format!("{note} {}\n", offset / 4096).as_bytes())?;
        Ok(held)
    }

    fn execute(&self, op: &BlockOp) -> std::io::Result<Bytes> {
        match op {
            BlockOp::Read { offset, len } => {
                let mut data = vec![0; *len as usize];
                self.device.read_exact_at(&mut data, *offset)?;
                return Ok(data.into());
            }
            BlockOp::Write { offset, data } => self.device.write_all_at(data, *offset)?,
            BlockOp::Flush => self.device.sync_data()?,
            BlockOp::Discard { offset, len } | BlockOp::WriteZeroes { offset, len } => {
                self.device.write_all_at(&vec![0; *len as usize], *offset)?;
            }
        }
        Ok(Bytes::new())
    }
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [socket, record, file, journal, queues, hold] = args.as_slice() else {
        anyhow::bail!("usage: blk-target SOCKET RECORD FILE JOURNAL QUEUES HOLD");
    };
    let device = OpenOptions::new().read(true).write(true).open(file).context("device file")?;
    let journal = OpenOptions::new().append(true).create(true).open(journal).context("journal")?;
    let (sender, receiver) = sync_channel(4096);
    let worker = Arc::new(Worker {
        device: device.try_clone()?,
        journal: Mutex::new((journal, 0)),
        hold: hold.parse()?,
        held: Mutex::default(),
    });
    let receiver = Arc::new(Mutex::new(receiver));
    for _ in 0..2 {
        let (worker, receiver) = (Arc::clone(&worker), Arc::clone(&receiver));
        thread::spawn(move || worker.run(&receiver));
    }
    let size = device.metadata()?.len();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let _target = Target::start(
        TargetOptions {
            socket: socket.into(),
            socket_group: None,
            inflight: record.into(),
            queues: queues.parse()?,
            serial: "0123456789abcdef01234567".to_owned(),
            access: Access::ReadWrite,
            runtime: runtime.handle().clone(),
            poll: BusyPoll::new(),
        },
        Arc::new(FileDevice { size, work: sender }),
    )?;
    loop {
        thread::park();
    }
}
