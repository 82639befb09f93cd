//! The VMM role: `hci vmm run --config vmm.json`.
//!
//! One process for each running VM, around [`vmm::Vm`]. The control process starts it and may go away: the VMM has a
//! session of its own, is found again by its files ([`record`]) and takes orders on `vmm.sock` ([`protocol`]). A guest
//! that resets itself gets a new machine in the same process. When the guest has ended, the process records how, and
//! exits with a code that says the same. The state of a guest goes out and comes in over the same socket, in pieces ([`saved`]). Another process of
//! the same node can take the guest over, with its memory ([`succession`]).
//!
//! Before it makes the guest the process gives up whatever it does not need ([`jail`]): a guest that takes it over is still locked up.
//!
//! Threads: those of the `vmm` crate, the main thread that waits for the guest's end, and one that serves the socket. What that one may not do
//! itself, as making a device's thread, the main thread does for it.

pub mod jail;
mod machine;
pub mod protocol;
pub mod record;
pub mod saved;
pub mod succession;

use std::{
    fs::File,
    io::Write,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context;
use futures_util::future::BoxFuture;
use netfabric::rpc::{Caller, ErrorCode, Handler, Request, Response, RpcError, serve_unix};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use vmm::{ExitReason, Inheritance, MigrationProgress, TransferError, Vm, VmError, VmHandle, VmState};

use self::{
    machine::Making,
    protocol::{
        AwaitGuest, BringFlow, BringState, FetchState, GetDescriptors, GuestState, HandOver, Kill, Migrate,
        Pause, Plug, PowerButton, Reset, Reshape, Resume, Save, SaveForSuccessor, StateFlow, Status, Unplug,
        VmmCall, VmmStatus,
    },
    record::{Begin, Ended, ExitFile, ExitRecord, RunFile, RunLock},
    saved::{Brought, Fetched, Incoming, Next},
    succession::Heir,
};
use crate::{
    isolation::identity,
    paths::{SUCCESSOR, VmPaths},
};

/// A guest that resets itself over and over does so this often at most.
const RESET_PAUSE: Duration = Duration::from_secs(1);

/// `hci vmm run`
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// What to run, as the control process wrote it; sockets and records are made beside it.
    #[arg(long)]
    pub config: PathBuf,
    /// User in whose group to run, as a user that no other VM has, when started by root.
    #[arg(long)]
    pub user: Option<String>,
}

/// Exit codes: how the guest ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Code {
    GuestShutdown = 0,
    Failed = 1,
    Killed = 20,
}

/// Runs a VM until its guest has ended.
pub fn run(args: &Args) -> ExitCode {
    match prepare(args).and_then(confine).map(run_prepared) {
        Ok(ended) => {
            let code = match ended {
                Ended::GuestShutdown => Code::GuestShutdown,
                Ended::Killed | Ended::LeaseLapsed => Code::Killed,
                Ended::Crashed(_) => Code::Failed,
            };
            ExitCode::from(code as u8)
        }
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::from(Code::Failed as u8)
        }
    }
}

/// Runs the guest to its end, records how it ended, and gives the directory back.
pub(crate) fn run_prepared(prepared: Prepared) -> Ended {
    let Prepared { paths, run, origin, hold, exit } = prepared;
    let hold = Arc::new(Mutex::new(Some(hold)));
    let ended = run_to_the_end(&paths, &run, origin, hold.clone());
    let hold = hold.lock().take();
    match hold {
        Some(Hold::Run(lock)) => {
            tracing::info!(vm = %run.vm, epoch = run.epoch.0, ?ended, "the guest has ended");
            let record = ExitRecord { epoch: run.epoch, ended: ended.clone() };
            if let Err(error) = exit.write(&record) {
                tracing::error!(%error, "cannot record how the guest ended");
            }
            // Whoever sees the lock free must find the record.
            drop(lock);
        }
        Some(Hold::Left(lock)) => {
            tracing::info!(vm = %run.vm, epoch = run.epoch.0, "the guest goes on in another process");
            lock.leave();
        }
        Some(Hold::Heir(_)) | None => tracing::info!(vm = %run.vm, ?ended, "the guest stays in its process"),
    }
    ended
}

/// A process that is about to make its guest.
pub struct Prepared {
    /// The VM's files.
    pub paths: VmPaths,
    /// What to run.
    pub run: RunFile,
    /// What its first guest begins with.
    origin: Origin,
    /// What holds the VM's directory.
    hold: Hold,
    /// Where to record the end.
    pub exit: ExitFile,
}

/// What a process has to do with the VM's directory.
#[derive(Debug)]
pub enum Hold {
    /// It runs the VM.
    Run(RunLock),
    /// It ran the VM, and has left it to another process.
    Left(RunLock),
    /// It may become the one that does.
    Heir(Heir),
}

impl Hold {
    fn take(paths: &VmPaths, begin: Begin) -> std::io::Result<(Self, Origin)> {
        let run = || RunLock::take(&paths.pid()).map(Self::Run);
        Ok(match begin {
            Begin::Boot => (run()?, Origin::Boot),
            Begin::Saved => (run()?, Origin::Saved),
            Begin::Successor(predecessor) => {
                let (heir, memory) = Heir::new(paths, predecessor)?;
                (Self::Heir(heir), Origin::Kept(memory))
            }
        })
    }
}

/// What the first guest of a process begins with.
#[derive(Debug)]
enum Origin {
    /// It boots.
    Boot,
    /// A state that is brought.
    Saved,
    /// This memory, and a state of the rest that is brought.
    Kept(File),
}

/// Becomes an unprivileged process with a session of its own that holds the VM's directory.
///
/// To be called by the process's only thread: there is no way back.
pub fn prepare(args: &Args) -> anyhow::Result<Prepared> {
    // Fails only when this process leads a session already, which is what is wanted.
    let _ = nix::unistd::setsid();
    identity::close_inherited().context("cannot close what was inherited")?;
    // The allocator, told to leave huge pages alone, has switched them off for all of the process, and the guest's memory is to be in them.
    let _ = nix::sys::prctl::set_thp_disable(false);
    let dir =
        args.config.parent().filter(|dir| dir.is_absolute()).context("--config needs an absolute path")?;
    let paths = VmPaths::in_dir(dir);
    let prepared = Prepared::take(paths, read_config(&args.config)?)?;
    jail::enter(&prepared.paths, &prepared.run, args.user.as_deref())?;
    Ok(prepared)
}

impl Prepared {
    /// Takes a hold of the VM's directory, for a process that is not locked up yet.
    pub(crate) fn take(paths: VmPaths, run: RunFile) -> anyhow::Result<Self> {
        let (hold, origin) = Hold::take(&paths, run.begin)
            .with_context(|| format!("cannot take {}", paths.dir().display()))?;
        let exit = ExitFile::open(&paths).context("cannot make the record of the end")?;
        Ok(Self { paths, run, origin, hold, exit })
    }
}

/// The last layer: from here on the process asks the kernel for what its guest needs and nothing else.
pub fn confine(prepared: Prepared) -> anyhow::Result<Prepared> {
    vmm::isolation::confine_process().context("cannot install the system call filter")?;
    Ok(prepared)
}

fn read_config(path: &Path) -> anyhow::Result<RunFile> {
    let text = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("{} makes no sense", path.display()))
}

/// What the socket's server shares with the main thread.
struct Machine {
    run: RunFile,
    paths: VmPaths,
    now: Mutex<Now>,
    /// None for the moment in which it changes, and when the process is about to end.
    hold: Arc<Mutex<Option<Hold>>>,
    /// The state of the guest, while it is saved. Dropping it ends that.
    fetched: tokio::sync::Mutex<Option<Fetched>>,
    /// The state that the guest is made from, while it is brought. Dropping it ends the guest.
    brought: tokio::sync::Mutex<Option<Brought>>,
    /// Whether there was a guest.
    made: watch::Sender<bool>,
}

struct Now {
    handle: Option<VmHandle>,
    making: Making,
    resets: u32,
    /// How far the last migration is.
    migration: Option<Arc<MigrationProgress>>,
    /// An order to end that came while there was no guest.
    kill: bool,
    offer: Offer,
}

/// Whether the guest, which is held, may be left to a successor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Offer {
    /// It may not.
    None,
    /// It may: it was written for one, and nothing has happened to it since.
    Made,
}

fn run_to_the_end(paths: &VmPaths, run: &RunFile, origin: Origin, hold: Arc<Mutex<Option<Hold>>>) -> Ended {
    let (first, brought) = match origin {
        Origin::Boot => (First::Boots, None),
        Origin::Saved => {
            let (incoming, brought) = saved::incoming();
            (First::GoesOn(incoming), Some(brought))
        }
        Origin::Kept(memory) => {
            let (incoming, brought) = saved::incoming();
            (First::Succeeds(memory, incoming), Some(brought))
        }
    };
    let machine = Arc::new(Machine {
        run: run.clone(),
        paths: paths.clone(),
        hold,
        now: Mutex::new(Now {
            handle: None,
            making: Making::new(run.config.clone()),
            resets: 0,
            migration: None,
            kill: false,
            offer: Offer::None,
        }),
        fetched: Default::default(),
        brought: tokio::sync::Mutex::new(brought),
        made: watch::Sender::new(false),
    });
    let shutdown = CancellationToken::new();
    let server = match serve_orders(machine.clone(), shutdown.clone()) {
        Ok(server) => server,
        Err(error) => return Ended::Crashed(format!("cannot serve orders: {error}")),
    };
    let ended = run_guests(&machine, first);
    shutdown.cancel();
    if server.join().is_err() {
        tracing::error!("the thread that takes orders panicked");
    }
    ended
}

/// How a guest begins.
enum First {
    Boots,
    GoesOn(Incoming),
    /// In this memory, once another process has left its backends.
    Succeeds(File, Incoming),
}

/// Runs guest after guest until one ends for another reason than a reset. The first one may go on with a saved state.
fn run_guests(machine: &Machine, mut next: First) -> Ended {
    loop {
        let started = Instant::now();
        let config = machine.now.lock().making.next();
        let made = match std::mem::replace(&mut next, First::Boots) {
            First::Boots => Vm::start(config),
            First::GoesOn(mut state) => Vm::restore(config, &mut state),
            First::Succeeds(memory, mut state) => {
                state.await_first();
                let socket_prefix = SUCCESSOR.to_owned();
                Vm::succeed(config, Inheritance { memory, socket_prefix }, &mut state)
            }
        };
        let vm = match made {
            Ok(vm) => vm,
            // The state stopped coming because of the order.
            Err(VmError::Saved(_)) if machine.now.lock().kill => return Ended::Killed,
            Err(error) => return Ended::Crashed(error_chain(&error)),
        };
        {
            let mut now = machine.now.lock();
            if now.kill {
                vm.handle().kill();
            }
            now.handle = Some(vm.handle());
        }
        machine.made.send_replace(true);
        let reason = vm.wait();
        let mut now = machine.now.lock();
        now.handle = None;
        match reason {
            ExitReason::Shutdown => return Ended::GuestShutdown,
            ExitReason::Killed => return Ended::Killed,
            ExitReason::Crashed(why) => return Ended::Crashed(why),
            ExitReason::Reset if now.kill => return Ended::Killed,
            ExitReason::Reset => {
                now.resets += 1;
                drop(now);
                tracing::info!(vm = %machine.run.vm, "the guest resets itself");
                std::thread::sleep(RESET_PAUSE.saturating_sub(started.elapsed()));
            }
        }
    }
}

fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

fn serve_orders(
    machine: Arc<Machine>,
    shutdown: CancellationToken,
) -> std::io::Result<std::thread::JoinHandle<()>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let predecessor = machine.predecessor()?;
    let socket = machine.paths.socket();
    let socket = if predecessor.is_some() { machine.paths.successor(&socket) } else { socket };
    std::thread::Builder::new().name("orders".to_owned()).spawn(move || {
        let served = runtime.block_on(async {
            if let Some(predecessor) = predecessor {
                tokio::spawn(machine.clone().follow(predecessor));
            }
            serve_unix(&socket, Arc::new(Orders(machine.clone())), shutdown).await
        });
        if let Err(error) = served {
            // The guest goes on; the control process can still see and kill it through its files.
            tracing::error!(%error, "orders cannot be taken");
        }
    })
}

struct Orders(Arc<Machine>);

fn starting() -> RpcError {
    RpcError::new(ErrorCode::Unavailable, "the guest is just being made")
}

fn refused(why: impl Into<String>) -> RpcError {
    RpcError::new(ErrorCode::Refused, why)
}

fn ended() -> RpcError {
    RpcError::new(ErrorCode::Refused, "the guest has ended")
}

impl Machine {
    async fn dispatch(self: &Arc<Self>, request: Request) -> Result<Response, RpcError> {
        match request.method {
            Status::METHOD => Ok(Response::new(&self.status().await)?),
            PowerButton::METHOD => {
                self.guest()?.power_button();
                Ok(Response::new(&())?)
            }
            Reset::METHOD => {
                self.guest()?.reset();
                Ok(Response::new(&())?)
            }
            Kill::METHOD => {
                self.kill();
                Ok(Response::new(&())?)
            }
            Pause::METHOD => {
                self.have_done(VmHandle::pause).await?;
                Ok(Response::new(&())?)
            }
            Resume::METHOD => {
                self.have_done(VmHandle::resume).await?;
                Ok(Response::new(&())?)
            }
            Save::METHOD => {
                self.save(VmHandle::save, Offer::None).await?;
                Ok(Response::new(&())?)
            }
            GetDescriptors::METHOD => Ok(Response::new(&self.descriptors()?)?),
            SaveForSuccessor::METHOD => {
                self.save(VmHandle::save_for_successor, Offer::Made).await?;
                Ok(Response::new(&())?)
            }
            HandOver::METHOD => {
                self.hand_over(request.decode()?).await?;
                Ok(Response::new(&())?)
            }
            Migrate::METHOD => {
                self.migrate(request.decode()?).await?;
                Ok(Response::new(&())?)
            }
            AwaitGuest::METHOD => {
                // Does not end before the process does.
                let _ = self.made.subscribe().wait_for(|made| *made).await;
                Ok(Response::new(&())?)
            }
            Plug::METHOD => {
                self.plug(request.decode()?).await?;
                Ok(Response::new(&())?)
            }
            Unplug::METHOD => {
                self.unplug(request.decode()?)?;
                Ok(Response::new(&())?)
            }
            Reshape::METHOD => {
                self.reshape(request.decode()?).await?;
                Ok(Response::new(&())?)
            }
            FetchState::METHOD => self.fetch(request.decode()?).await,
            BringState::METHOD => {
                self.bring(request.decode()?, request.bulk).await?;
                Ok(Response::new(&())?)
            }
            other => Err(RpcError::unknown_method(other)),
        }
    }

    /// The guest, if it is this process's.
    fn guest(&self) -> Result<VmHandle, RpcError> {
        if !self.runs_the_vm() {
            return Err(refused("the guest is another process's"));
        }
        self.now.lock().handle.clone().ok_or_else(starting)
    }

    async fn status(&self) -> VmmStatus {
        let taken = self.brought.lock().await.as_ref().map(Brought::taken);
        let now = self.now.lock();
        let guest = match now.handle.as_ref().map(|handle| handle.status().state) {
            Some(VmState::Running) => GuestState::Running,
            Some(VmState::Paused) => GuestState::Paused,
            Some(VmState::Ended(_)) => GuestState::Starting,
            None => taken.map_or(GuestState::Starting, GuestState::Restoring),
        };
        let migration = now.migration.as_ref().map(|progress| progress.snapshot());
        let machine = now.handle.as_ref().map(Self::seen);
        VmmStatus { vm: self.run.vm, epoch: self.run.epoch, guest, resets: now.resets, migration, machine }
    }

    fn kill(&self) {
        let mut now = self.now.lock();
        now.kill = true;
        if let Some(handle) = &now.handle {
            handle.kill();
        }
        // Whoever waits for a piece waits no longer. One that is on its way right now is followed by none.
        if let Ok(mut fetched) = self.fetched.try_lock() {
            *fetched = None;
        }
        if let Ok(mut brought) = self.brought.try_lock() {
            *brought = None;
        }
    }

    /// Has the main thread do it, which it can once nothing is saved any more.
    async fn have_done(self: &Arc<Self>, act: fn(&VmHandle) -> Result<(), VmError>) -> Result<(), RpcError> {
        *self.fetched.lock().await = None;
        let machine = self.clone();
        self.on_main_thread(move |guest| {
            machine.now.lock().offer = Offer::None;
            act(guest)
        })
        .await
    }

    /// Begins to write the guest, held. Once that is done, it may be left to a successor or not.
    async fn save(
        self: &Arc<Self>,
        write: fn(&VmHandle, &mut dyn Write) -> Result<(), TransferError>,
        offer: Offer,
    ) -> Result<(), RpcError> {
        let guest = self.guest()?;
        let (mut out, fetched) = saved::outgoing();
        // What was saved before comes to its end by this.
        *self.fetched.lock().await = Some(fetched);
        let machine = self.clone();
        guest.ask(move |guest| {
            machine.now.lock().offer = Offer::None;
            let saved = guest.pause().map_err(|error| error_chain(&error));
            let saved = saved.and_then(|()| write(guest, &mut out).map_err(|error| error_chain(&error)));
            if saved.is_ok() {
                machine.now.lock().offer = offer;
            }
            out.finish(saved);
        });
        Ok(())
    }

    async fn migrate(&self, Migrate { options }: Migrate) -> Result<(), RpcError> {
        let guest = self.guest()?;
        let (mut out, fetched) = saved::outgoing();
        *self.fetched.lock().await = Some(fetched);
        let progress = Arc::new(MigrationProgress::default());
        self.now.lock().migration = Some(progress.clone());
        guest.ask(move |guest| {
            let moved = guest.migrate(&mut out, &options, &progress);
            out.finish(moved.map(drop).map_err(|error| error_chain(&error)));
        });
        Ok(())
    }

    async fn fetch(&self, FetchState { at }: FetchState) -> Result<Response, RpcError> {
        let mut fetched = self.fetched.lock().await;
        let state = fetched.as_mut().ok_or_else(|| refused("the guest is not being saved"))?;
        if state.at() != at {
            return Err(refused("pieces are fetched one after the other"));
        }
        match state.next().await {
            Some(Next::Piece(piece)) => Ok(Response::new(&StateFlow::Piece)?.with_bulk(piece)),
            Some(Next::Settle) => Ok(Response::new(&StateFlow::Settle)?),
            Some(Next::Held) => Ok(Response::new(&StateFlow::Held)?),
            Some(Next::Quiet) => Ok(Response::new(&StateFlow::Quiet)?),
            Some(Next::End) => Ok(Response::new(&StateFlow::End)?),
            Some(Next::Failed(why)) => Err(refused(why)),
            None => Err(ended()),
        }
    }

    async fn bring(&self, BringState { at, flow }: BringState, piece: bytes::Bytes) -> Result<(), RpcError> {
        let mut brought = self.brought.lock().await;
        let state = brought.as_mut().ok_or_else(|| refused("the guest goes on with no saved state"))?;
        if state.taken() != at {
            return Err(refused("pieces are brought one after the other"));
        }
        if !state.push(piece).await {
            return Err(refused("the guest takes no more of its state"));
        }
        if flow == BringFlow::Last {
            state.end();
        }
        Ok(())
    }
}

impl Handler for Orders {
    fn handle(&self, _from: Caller, request: Request) -> BoxFuture<'static, Result<Response, RpcError>> {
        let machine = self.0.clone();
        Box::pin(async move { machine.dispatch(request).await })
    }
}
