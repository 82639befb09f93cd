//! Keepers against a real QEMU guest agent, where it is installed, and against agents that misbehave.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::UnixListener,
    sync::mpsc,
    time::Instant,
};

use super::*;

const DEADLINE: Duration = Duration::from_secs(30);

fn keeper(path: &Path) -> Keeper {
    Keeper::start(VmId::random(), path.to_owned())
}

async fn ask(keeper: &Keeper, request: Request) -> Result<Answer, AgentFailure> {
    tokio::time::timeout(DEADLINE, keeper.ask(request)?).await.unwrap().unwrap()
}

async fn seen(keeper: &Keeper) -> AgentReport {
    let began = Instant::now();
    loop {
        if let Some(report) = keeper.seen().filter(|report| !report.interfaces.is_empty()) {
            return report;
        }
        assert!(began.elapsed() < DEADLINE, "the agent is not seen");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A QEMU guest agent on this machine. It may not do what would harm the machine.
struct RealAgent {
    process: Child,
    socket: PathBuf,
    _dir: tempfile::TempDir,
}

impl RealAgent {
    const FORBIDDEN: &str = "guest-shutdown,guest-fsfreeze-freeze,guest-fsfreeze-freeze-list,guest-fstrim,\
        guest-suspend-disk,guest-suspend-ram,guest-suspend-hybrid,guest-set-time,guest-set-vcpus,\
        guest-set-user-password,guest-set-memory-blocks";

    fn start() -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("agent.sock");
        let process = Command::new("qemu-ga")
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .args(["-m", "unix-listen", "-b", Self::FORBIDDEN, "-p"])
            .arg(&socket)
            .arg("-t")
            .arg(dir.path())
            .arg("-f")
            .arg(dir.path().join("pid"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        match process {
            Ok(process) => Some(Self { process, socket, _dir: dir }),
            Err(error) => {
                eprintln!("SKIPPED: qemu-ga: {error}");
                None
            }
        }
    }

    fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.process.id()).unwrap());
        nix::sys::signal::kill(pid, signal).unwrap();
    }
}

impl Drop for RealAgent {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

async fn run_in(keeper: &Keeper, command: &[&str]) -> Ended {
    let command = command.iter().map(ToString::to_string).collect();
    let Answer::Started(pid) = ask(keeper, Request::Start { command }).await.unwrap() else {
        panic!("not started")
    };
    let began = Instant::now();
    loop {
        match ask(keeper, Request::Progress(pid)).await.unwrap() {
            Answer::Progress(Progress::Ended(ended)) => return *ended,
            _ => assert!(began.elapsed() < DEADLINE, "it does not end"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_real_agent_tells_addresses_runs_programs_and_may_refuse() {
    let Some(agent) = RealAgent::start() else { return };
    let keeper = keeper(&agent.socket);
    let report = seen(&keeper).await;
    assert!(report.version.starts_with(|first: char| first.is_ascii_digit()), "{report:?}");
    assert!(report.interfaces.iter().all(|interface| interface.name != "lo"), "{report:?}");

    let ended = run_in(&keeper, &["/bin/sh", "-c", "echo out; echo err >&2; exit 7"]).await;
    assert_eq!((ended.how, ended.output), (HowEnded::Exit(7), Output::Whole));
    assert_eq!((ended.stdout.as_slice(), ended.stderr.as_slice()), (&b"out\n"[..], &b"err\n"[..]));
    let ended = run_in(&keeper, &["/bin/sh", "-c", "kill -9 $$"]).await;
    assert_eq!(ended.how, HowEnded::Signal(9));
    let none = ask(&keeper, Request::Start { command: vec!["/no/such/program".to_owned()] }).await;
    assert!(matches!(&none, Err(AgentFailure::Refused(why)) if why.contains("/no/such/program")), "{none:?}");
    let unknown = ask(&keeper, Request::Progress(GuestPid(1))).await;
    assert!(matches!(unknown, Err(AgentFailure::Refused(_))), "{unknown:?}");
    for forbidden in [Request::Freeze, Request::Shutdown] {
        let refused = ask(&keeper, forbidden).await;
        assert!(matches!(refused, Err(AgentFailure::Refused(_))), "{refused:?}");
    }
}

#[tokio::test]
async fn output_beyond_the_limit_is_an_error_and_the_agent_is_used_on() {
    let Some(agent) = RealAgent::start() else { return };
    let keeper = keeper(&agent.socket);
    seen(&keeper).await;
    let command = ["/bin/sh", "-c", "head -c 3000000 /dev/zero"].map(str::to_owned).to_vec();
    let Ok(Answer::Started(pid)) = ask(&keeper, Request::Start { command }).await else {
        panic!("not started")
    };
    let began = Instant::now();
    let failure = loop {
        match ask(&keeper, Request::Progress(pid)).await {
            Ok(Answer::Progress(Progress::Running)) => assert!(began.elapsed() < DEADLINE),
            other => break other,
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    assert!(matches!(failure, Err(AgentFailure::Nonsense(_))), "{failure:?}");
    assert_eq!(run_in(&keeper, &["/bin/echo", "still there"]).await.stdout, b"still there\n");
}

#[tokio::test]
async fn answers_that_come_late_are_taken_for_nothing_else() {
    let Some(agent) = RealAgent::start() else { return };
    let keeper = keeper(&agent.socket);
    seen(&keeper).await;
    agent.signal(nix::sys::signal::Signal::SIGSTOP);
    let command = vec!["/bin/true".to_owned()];
    assert_eq!(ask(&keeper, Request::Start { command }).await, Err(AgentFailure::Silent));
    agent.signal(nix::sys::signal::Signal::SIGCONT);
    // It may have been given up meanwhile; then it is found again.
    seen(&keeper).await;
    assert_eq!(run_in(&keeper, &["/bin/echo", "in step"]).await.stdout, b"in step\n");
}

/// An agent that says what it is told to; nothing when that is none. What it was asked for is told.
struct FakeAgent {
    socket: PathBuf,
    asked: mpsc::UnboundedReceiver<String>,
    _dir: tempfile::TempDir,
    _task: tokio_util::task::AbortOnDropHandle<()>,
}

impl FakeAgent {
    fn start(mut says: impl FnMut(&str) -> Option<Vec<u8>> + Send + 'static) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("agent.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let (tell, asked) = mpsc::unbounded_channel();
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (from, mut to) = stream.into_split();
                let mut lines = BufReader::new(from);
                let mut line = Vec::new();
                while matches!(lines.read_until(b'\n', &mut line).await, Ok(1..)) {
                    let start = usize::from(line[0] == 0xff);
                    let told: Value = serde_json::from_slice(&line[start..]).unwrap();
                    line.clear();
                    let name = told["execute"].as_str().unwrap().to_owned();
                    let answer = match name.as_str() {
                        "guest-sync-delimited" => Some(
                            [
                                b"\xff",
                                json!({ "return": told["arguments"]["id"] }).to_string().as_bytes(),
                                b"\n",
                            ]
                            .concat(),
                        ),
                        other => says(other),
                    };
                    let _ = tell.send(name);
                    if let Some(answer) = answer
                        && to.write_all(&answer).await.is_err()
                    {
                        break;
                    }
                }
            }
        });
        Self { socket, asked, _dir: dir, _task: tokio_util::task::AbortOnDropHandle::new(task) }
    }

    async fn was_asked(&mut self, name: &str) -> Instant {
        let waited = tokio::time::timeout(DEADLINE, async {
            loop {
                if self.asked.recv().await.unwrap() == name {
                    return Instant::now();
                }
            }
        });
        waited.await.unwrap_or_else(|_| panic!("{name} was not asked for"))
    }
}

fn returned(value: &Value) -> Option<Vec<u8>> {
    Some(format!("{}\n", json!({ "return": value })).into_bytes())
}

/// What a healthy agent with frozen or thawed file systems says.
fn healthy(name: &str, status: &str) -> Option<Vec<u8>> {
    match name {
        "guest-info" => returned(&json!({ "version": "8" })),
        "guest-fsfreeze-status" => returned(&json!(status)),
        "guest-network-get-interfaces" => {
            returned(&json!([{ "name": "eth0", "ip-addresses": [{ "ip-address": "10.0.0.1" }] }]))
        }
        "guest-fsfreeze-freeze" | "guest-fsfreeze-thaw" => returned(&json!(2)),
        _ => None,
    }
}

#[tokio::test]
async fn what_was_frozen_is_thawed_by_order_or_by_itself() {
    let mut agent = FakeAgent::start(|name| healthy(name, "thawed"));
    let keeper = keeper(&agent.socket);
    seen(&keeper).await;
    assert_eq!(ask(&keeper, Request::Freeze).await, Ok(Answer::Frozen(2)));
    assert_eq!(ask(&keeper, Request::Thaw).await, Ok(Answer::Thawed(Hold::Held)));
    agent.was_asked("guest-fsfreeze-thaw").await;

    let frozen = Instant::now();
    assert_eq!(ask(&keeper, Request::Freeze).await, Ok(Answer::Frozen(2)));
    let thawed = agent.was_asked("guest-fsfreeze-thaw").await;
    assert!(thawed - frozen >= FREEZE_LIMIT - Duration::from_millis(100));
    assert_eq!(ask(&keeper, Request::Thaw).await, Ok(Answer::Thawed(Hold::Lapsed)), "nobody may rely on it");
}

#[tokio::test]
async fn what_somebody_left_frozen_is_thawed_at_once() {
    let mut agent = FakeAgent::start(|name| healthy(name, "frozen"));
    let _keeper = keeper(&agent.socket);
    agent.was_asked("guest-fsfreeze-thaw").await;
}

#[tokio::test]
async fn a_freeze_that_is_not_confirmed_is_thawed() {
    let mut agent = FakeAgent::start(|name| match name {
        "guest-fsfreeze-freeze" => Some(b"{\"return\":\"many\"}\n".to_vec()),
        name => healthy(name, "thawed"),
    });
    let keeper = keeper(&agent.socket);
    seen(&keeper).await;
    assert!(matches!(ask(&keeper, Request::Freeze).await, Err(AgentFailure::Nonsense(_))));
    agent.was_asked("guest-fsfreeze-thaw").await;
}

#[tokio::test]
async fn a_guest_that_shuts_down_says_nothing_and_that_is_fine() {
    for ends_at_once in [false, true] {
        let agent = FakeAgent::start(move |name| match name {
            "guest-shutdown" if ends_at_once => panic!("the agent ends with its guest"),
            name => healthy(name, "thawed"),
        });
        let keeper = keeper(&agent.socket);
        seen(&keeper).await;
        assert_eq!(ask(&keeper, Request::Shutdown).await, Ok(Answer::ShuttingDown));
    }
}

#[tokio::test]
async fn nonsense_is_an_error_and_nothing_worse() {
    let deep = [vec![b'['; 100_000], b"\n".to_vec()].concat();
    for nonsense in [
        b"\n".to_vec(),
        b"{}\n".to_vec(),
        b"\xff\xff\xff\n".to_vec(),
        b"{\"return\":{\"pid\":\"x\"}}\n".to_vec(),
        deep,
    ] {
        let said = nonsense.clone();
        let agent = FakeAgent::start(move |name| match name {
            "guest-exec" => Some(said.clone()),
            name => healthy(name, "thawed"),
        });
        let keeper = keeper(&agent.socket);
        seen(&keeper).await;
        let answer = ask(&keeper, Request::Start { command: vec!["x".to_owned()] }).await;
        assert!(matches!(answer, Err(AgentFailure::Nonsense(_))), "{answer:?}");
        assert_eq!(ask(&keeper, Request::Freeze).await, Ok(Answer::Frozen(2)), "it is used on");
    }
}

#[tokio::test]
async fn without_an_agent_everything_is_refused_soon() {
    let dir = tempfile::tempdir().unwrap();
    let keeper = keeper(&dir.path().join("none.sock"));
    assert_eq!(ask(&keeper, Request::Freeze).await, Err(AgentFailure::Away));
    assert_eq!(keeper.seen(), None);

    // A guest without a driver for the port: the connection is there, and nobody on it.
    let path = dir.path().join("silent.sock");
    let _silent = UnixListener::bind(&path).unwrap();
    let keeper = Keeper::start(VmId::random(), path);
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(matches!(keeper.ask(Request::Shutdown), Err(AgentFailure::Away)), "nobody is waited for");
}
