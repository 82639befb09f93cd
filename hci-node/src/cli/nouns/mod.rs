//! The nouns of the command line, one module each: the verbs, and how they call the API and show its answer.

mod cloud_init;
pub mod cluster;
pub mod devices;
pub mod disk;
pub mod event;
mod exec;
pub mod export;
pub mod image;
pub mod network;
pub mod node;
mod offline_disk;
pub mod pool;
pub mod snapshot;
pub mod status;
pub mod task;
pub mod vm;
pub mod volume;

use serde_json::Value;

use super::client::{Client, segment};
use super::exit::{CliError, Exit};
use super::output::{self, Column, Format};
use super::task::{Wait, finish};

/// What every verb needs: the node to ask, and how to print and wait.
#[derive(Debug, Clone)]
pub struct Context {
    /// The API of a node.
    pub client: Client,
    /// The form of the results.
    pub format: Format,
    /// Whether and how long to wait for tasks.
    pub wait: Wait,
    /// The answer to "are you sure" is yes.
    pub yes: bool,
}

impl Context {
    /// Lists a collection.
    pub async fn list(&self, path: &str, columns: &[Column]) -> Result<(), CliError> {
        output::print(self.format, &self.client.get(path).await?, columns)
    }

    /// Shows one object; people get YAML, as a table has no room for all of it.
    pub async fn show(&self, collection: &str, name: &str) -> Result<(), CliError> {
        let object = self.client.get(&object_path(collection, name)).await?;
        let format = match self.format {
            Format::Table | Format::Wide => Format::Yaml,
            other => other,
        };
        output::print(format, &object, &[])
    }

    /// Starts a change, waits for its task, then shows the object that it made or changed.
    pub async fn change(
        &self,
        answer: Value,
        collection: &str,
        name: &str,
        columns: &[Column],
    ) -> Result<(), CliError> {
        finish(&self.client, self.wait, answer).await?;
        match self.wait {
            Wait::No => Ok(()),
            Wait::Upto(_) => {
                let object = self.client.get(&object_path(collection, name)).await?;
                output::print(self.format, &object, columns)
            }
        }
    }

    /// Deletes an object after the question that a destructive verb asks.
    pub async fn delete(&self, collection: &str, name: &str, loss: &str) -> Result<(), CliError> {
        self.confirm(name, loss)?;
        let answer = self.client.delete(&object_path(collection, name)).await?;
        finish(&self.client, self.wait, answer).await?;
        say(&format!("{name} deleted"));
        Ok(())
    }

    /// Says what will be lost and asks for the object's name, unless `--yes` was given.
    pub fn confirm(&self, name: &str, loss: &str) -> Result<(), CliError> {
        use std::io::{BufRead, IsTerminal, Write};
        if self.yes {
            return Ok(());
        }
        if !std::io::stdin().is_terminal() {
            return Err(CliError::new(Exit::Refused, format!("this {loss}"))
                .next("add --yes to do it without a question"));
        }
        let mut err = std::io::stderr().lock();
        // A terminal that cannot be written to cannot be answered on either: the read below decides.
        let _ = write!(err, "this {loss}; type {name} to go on: ").and_then(|()| err.flush());
        let mut answer = String::new();
        match std::io::stdin().lock().read_line(&mut answer) {
            Ok(_) if answer.trim() == name => Ok(()),
            _ => Err(CliError::new(Exit::Refused, "nothing was changed")),
        }
    }
}

/// The path of one object of a collection.
pub fn object_path(collection: &str, name: &str) -> String {
    format!("{collection}/{}", segment(name))
}

/// Tells the user something that is not a result.
pub fn say(text: &str) {
    use std::io::Write;
    // Talk is worth less than the work: a closed stderr must not fail the command.
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}
