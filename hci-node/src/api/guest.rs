//! What is done inside a VM's guest, by its agent: programs run, file systems frozen around a snapshot.

use std::{sync::Arc, time::Duration};

use axum::{
    extract::{Path, State},
    response::{IntoResponse, Response},
};
use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use futures_util::{FutureExt, future::BoxFuture};

use super::{
    http::{member, running},
    problem::{Problem, ProblemKind},
    service::{self, ApiResponse},
    types as api, views,
};
use crate::{
    agent::{AgentFailure, Answer, GuestPid, Hold, HowEnded, Output, Progress, Request},
    control::{app::App, member::Member},
    state::{Op, Task, TaskId, TaskState, Vm},
};

/// Most arguments, and most bytes of a command.
const MAX_ARGUMENTS: usize = 256;
const MAX_COMMAND: usize = 64 << 10;
/// How long a snapshot may take while file systems are frozen. They are thawed earlier than by themselves, so that it is known
/// whether they held.
const SNAPSHOT_PATIENCE: Duration = Duration::from_secs(8);

impl From<AgentFailure> for Problem {
    fn from(failure: AgentFailure) -> Self {
        let kind = match &failure {
            AgentFailure::Away => ProblemKind::Unavailable,
            AgentFailure::Silent => ProblemKind::Timeout,
            AgentFailure::Refused(_) => ProblemKind::Conflict,
            AgentFailure::Nonsense(_) => ProblemKind::Internal,
        };
        Self::new(kind, failure.to_string(), "see whether it is there: hci vm get NAME shows agent")
    }
}

fn unexpected(answer: &Answer) -> Problem {
    Problem::new(ProblemKind::Internal, format!("the guest agent answered {answer:?}"), "try again")
}

/// `POST /v1/vms/NAME/exec`.
pub(super) async fn exec(
    State(app): State<Arc<App>>,
    Path(vm): Path<String>,
    body: Bytes,
) -> Result<Response, Problem> {
    let member = member(&app)?;
    let api::Exec { command } = service::parse(&body)?;
    let bytes: usize = command.iter().map(String::len).sum();
    if command.first().is_none_or(String::is_empty) || command.len() > MAX_ARGUMENTS || bytes > MAX_COMMAND {
        return Err(Problem::new(
            ProblemKind::Invalid,
            format!(
                "a command is a program and up to {MAX_ARGUMENTS} arguments, {MAX_COMMAND} bytes together"
            ),
            "hci vm exec NAME -- /bin/uname -a",
        ));
    }
    let (node, id) = running(&member, &vm)?;
    tracing::info!(vm = %id, program = command.first(), "running a program in a guest");
    match member.local.ask_agent(node, id, Request::Start { command }).await? {
        Answer::Started(pid) => Ok(ApiResponse::json(200, &api::ExecStarted { pid: pid.0 })?.into_response()),
        other => Err(unexpected(&other)),
    }
}

/// `GET /v1/vms/NAME/exec/PID`.
pub(super) async fn exec_progress(
    State(app): State<Arc<App>>,
    Path((vm, pid)): Path<(String, i64)>,
) -> Result<Response, Problem> {
    let member = member(&app)?;
    let (node, id) = running(&member, &vm)?;
    match member.local.ask_agent(node, id, Request::Progress(GuestPid(pid))).await? {
        Answer::Progress(progress) => Ok(ApiResponse::json(200, &shown(progress))?.into_response()),
        other => Err(unexpected(&other)),
    }
}

fn shown(progress: Progress) -> api::ExecProgress {
    let Progress::Ended(ended) = progress else { return api::ExecProgress::Running };
    let (exit_code, signal) = match ended.how {
        HowEnded::Exit(code) => (Some(code), None),
        HowEnded::Signal(signal) => (None, Some(signal)),
    };
    api::ExecProgress::Ended {
        exit_code,
        signal,
        stdout: STANDARD.encode(ended.stdout),
        stderr: STANDARD.encode(ended.stderr),
        output: match ended.output {
            Output::Whole => api::ExecOutput::Whole,
            Output::Cut => api::ExecOutput::Cut,
        },
    }
}

/// Takes the snapshot of a VM's disks, with its file systems frozen if its agent can do that.
pub(super) async fn snapshot(member: &Arc<Member>, vm: &Vm, op: Op) -> Result<ApiResponse, Problem> {
    let Some(run) = vm.assignment else {
        let task = service::propose(member, op).await?;
        return accepted(&task, api::Consistency::AtRest, None);
    };
    let ask = |request| member.local.ask_agent(run.node, vm.id, request);
    let propose = service::propose(member, op);
    let end = |task: &Task| settled(member.clone(), task.id).boxed();
    let (task, lapse) = frozen_while(ask, propose, end).await?;
    match lapse {
        None => accepted(&task, api::Consistency::FileSystems, None),
        Some(why) => accepted(&task, api::Consistency::Crash, Some(why)),
    }
}

/// Freezes, takes, waits until that has come to its end, and thaws, also when taking fails. Should it not come to the thawing, the agent's
/// keeper thaws by itself. Returns why what was taken is not consistent, if it is not. Without an agent nothing is waited for.
async fn frozen_while<T>(
    ask: impl Fn(Request) -> BoxFuture<'static, Result<Answer, AgentFailure>>,
    take: impl Future<Output = Result<T, Problem>>,
    end: impl FnOnce(&T) -> BoxFuture<'static, Option<TaskState>>,
) -> Result<(T, Option<String>), Problem> {
    match ask(Request::Freeze).await {
        Ok(Answer::Frozen(_)) => {}
        Ok(other) => return Ok((take.await?, Some(format!("the guest agent answered {other:?}")))),
        Err(failure) => return Ok((take.await?, Some(failure.to_string()))),
    }
    let taken = take.await;
    let ended = match &taken {
        Ok(taken) => end(taken).await,
        Err(_) => None,
    };
    let thawed = ask(Request::Thaw).await;
    let taken = taken?;
    let lapse = match (ended, thawed) {
        (Some(TaskState::Done), Ok(Answer::Thawed(Hold::Held))) => return Ok((taken, None)),
        (Some(TaskState::Failed(_)), _) => "it was not taken".to_owned(),
        (Some(TaskState::Running) | None, _) => "it took longer than file systems may be frozen".to_owned(),
        (Some(TaskState::Done), Err(failure)) => format!("thawing: {failure}"),
        (Some(TaskState::Done), Ok(_)) => "the file systems were thawed before it was taken".to_owned(),
    };
    Ok((taken, Some(lapse)))
}

fn accepted(task: &Task, consistency: api::Consistency, why: Option<String>) -> Result<ApiResponse, Problem> {
    ApiResponse::json(202, &api::SnapshotAccepted { task: views::task(task), consistency, why })
}

/// How a task ended; none when it does not in time.
async fn settled(member: Arc<Member>, id: TaskId) -> Option<TaskState> {
    let mut state = member.replicated.state();
    let of = |state: &crate::state::ClusterState| state.tasks.get(&id).map(|task| task.state.clone());
    let ended = state.wait_for(|state| of(state).is_none_or(|state| state != TaskState::Running));
    match tokio::time::timeout(SNAPSHOT_PATIENCE, ended).await {
        Ok(Ok(state)) => of(&state),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::Ended;

    /// What comes of a snapshot, and what the agent was asked for.
    async fn around(
        freeze: Result<Answer, AgentFailure>,
        taken: Result<(), Problem>,
        ended: Option<TaskState>,
        thaw: Result<Answer, AgentFailure>,
    ) -> (Result<Option<String>, Problem>, Vec<Request>) {
        let asked = parking_lot::Mutex::new(Vec::new());
        let ask = |request: Request| {
            let answer = if request == Request::Freeze { freeze.clone() } else { thaw.clone() };
            asked.lock().push(request);
            std::future::ready(answer).boxed()
        };
        let result = frozen_while(ask, async { taken }, |()| std::future::ready(ended).boxed()).await;
        (result.map(|((), lapse)| lapse), asked.into_inner())
    }

    #[tokio::test]
    async fn file_systems_are_thawed_whatever_happens_and_only_a_whole_freeze_counts() {
        let frozen = || Ok(Answer::Frozen(2));
        let held = || Ok(Answer::Thawed(Hold::Held));
        let both = vec![Request::Freeze, Request::Thaw];
        let (consistent, asked) = around(frozen(), Ok(()), Some(TaskState::Done), held()).await;
        assert_eq!((consistent.unwrap(), &asked), (None, &both));

        let refused = Err(Problem::new(ProblemKind::Conflict, "the name is taken", ""));
        let (result, asked) = around(frozen(), refused, None, held()).await;
        assert!(result.is_err());
        assert_eq!(asked, both, "also when nothing was taken");

        for (ended, thaw, why) in [
            (None, held(), "longer"),
            (Some(TaskState::Done), Ok(Answer::Thawed(Hold::Lapsed)), "thawed before"),
            (Some(TaskState::Done), Err(AgentFailure::Silent), "in time"),
        ] {
            let (lapse, asked) = around(frozen(), Ok(()), ended, thaw).await;
            let lapse = lapse.unwrap().unwrap();
            assert!(lapse.contains(why), "{lapse}");
            assert_eq!(asked, both);
        }

        let (lapse, asked) = around(Err(AgentFailure::Away), Ok(()), None, held()).await;
        assert!(lapse.unwrap().unwrap().contains("no guest agent"));
        assert_eq!(asked, [Request::Freeze], "there is nothing to thaw");
    }

    #[test]
    fn output_and_exit_are_told_as_they_are() {
        let ended =
            Ended { how: HowEnded::Signal(9), stdout: vec![0, 255], stderr: vec![], output: Output::Cut };
        let told = serde_json::to_value(shown(Progress::Ended(Box::new(ended)))).unwrap();
        assert_eq!(
            told,
            serde_json::json!({
                "state": "ended", "exit_code": null, "signal": 9, "stdout": "AP8=", "stderr": "", "output": "cut",
            })
        );
        assert_eq!(
            serde_json::to_value(shown(Progress::Running)).unwrap(),
            serde_json::json!({ "state": "running" })
        );
    }
}
