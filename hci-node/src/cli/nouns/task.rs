//! `hci task`: the changes under way and those that ended.

use clap::Subcommand;

use super::{Context, object_path};
use crate::cli::completion::names;
use crate::cli::exit::CliError;
use crate::cli::output::{self, Column, Show, column};
use crate::cli::task::finish;

/// The verbs of `hci task`.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// List the tasks, the newest last.
    #[command(after_help = "Examples:\n  hci task list\n  hci task list -o json\nAPI: GET /v1/tasks")]
    List,
    /// Show one task.
    #[command(
        after_help = "Examples:\n  hci task get 0192f0c4-…\n  hci task get ID -o json\nAPI: GET /v1/tasks/ID"
    )]
    Get {
        /// The task's id.
        #[arg(add = names("/v1/tasks"))]
        id: String,
    },
    /// Wait until a task is done.
    #[command(
        after_help = "Examples:\n  hci task wait 0192f0c4-…\n  hci task wait ID --timeout 10m\nAPI: GET /v1/tasks/ID"
    )]
    Wait {
        /// The task's id.
        #[arg(add = names("/v1/tasks"))]
        id: String,
    },
}

const COLUMNS: &[Column] = &[
    column("ID", "/id"),
    column("KIND", "/kind"),
    column("TARGET", "/target"),
    column("STATE", "/state"),
    column("PROGRESS", "/progress").shown(Show::Percent),
    column("MESSAGE", "/message"),
    column("ERROR", "/error/detail"),
    column("CREATED", "/created").wide(),
    column("FINISHED", "/finished").wide(),
];

/// Runs a verb of `hci task`.
pub async fn run(context: &Context, verb: Verb) -> Result<(), CliError> {
    match verb {
        Verb::List => context.list("/v1/tasks", COLUMNS).await,
        Verb::Get { id } => context.show("/v1/tasks", &id).await,
        Verb::Wait { id } => {
            let task = context.client.get(&object_path("/v1/tasks", &id)).await?;
            let done = finish(&context.client, context.wait, task).await?;
            output::print(context.format, &done, COLUMNS)
        }
    }
}
