//! Forming a cluster unattended: `firstboot.toml` in the state directory, written by the installer.
//!
//! ```toml
//! node_name = "n1"                    # optional
//! [create]                            # on one node
//! name = "prod"
//! join_secret = "a secret of 16 characters or more"
//! ```
//! ```toml
//! [join]                              # on the others
//! address = "10.0.0.1:7443"
//! secret = "the same secret"
//! ca_fingerprint = "sha256:…"         # optional: without it the secret proves the cluster
//! ```

use std::{net::SocketAddr, path::Path};

use netfabric::pki::Fingerprint;
use serde::Deserialize;

use super::{client::Invitation, token::Secret};

/// Name of the file in the state directory.
pub const FILE: &str = "firstboot.toml";
/// Shortest join secret: it is all that keeps strangers out.
const MIN_SECRET: usize = 16;

/// What a node does at its first start.
#[derive(Clone, Debug)]
pub struct FirstBoot {
    /// Name of the node.
    pub node_name: Option<String>,
    /// What to do.
    pub action: Action,
}

/// What to do.
#[derive(Clone, Debug)]
pub enum Action {
    /// Create the cluster.
    Create {
        /// Its name.
        name: String,
        /// With this the others join.
        join_secret: Option<Secret>,
    },
    /// Join a cluster.
    Join(Invitation),
}

/// What is wrong with the file.
#[derive(Debug, thiserror::Error)]
pub enum FirstBootError {
    /// It cannot be read.
    #[error("cannot read {FILE}")]
    Read(#[source] std::io::Error),
    /// It is no TOML, or has unknown keys.
    #[error("{FILE} is not valid: {0}")]
    Parse(#[from] toml::de::Error),
    /// It says nothing, or too much.
    #[error("{FILE} needs either [create] or [join]")]
    Which,
    /// The secret is too short.
    #[error("the join secret in {FILE} is shorter than {MIN_SECRET} characters")]
    Secret,
    /// The fingerprint has another form.
    #[error("the CA fingerprint in {FILE} is not of the form sha256:HEX")]
    Fingerprint,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    node_name: Option<String>,
    create: Option<Create>,
    join: Option<Join>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Create {
    name: String,
    join_secret: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Join {
    address: SocketAddr,
    secret: String,
    ca_fingerprint: Option<String>,
}

/// Reads the file; none when there is none.
pub fn read(state_dir: &Path) -> Result<Option<FirstBoot>, FirstBootError> {
    match std::fs::read_to_string(state_dir.join(FILE)) {
        Ok(text) => parse(&text).map(Some),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(FirstBootError::Read(error)),
    }
}

fn secret(phrase: &str) -> Result<Secret, FirstBootError> {
    if phrase.len() < MIN_SECRET {
        return Err(FirstBootError::Secret);
    }
    Ok(Secret::from_phrase(phrase))
}

fn parse(text: &str) -> Result<FirstBoot, FirstBootError> {
    let file: File = toml::from_str(text)?;
    let action = match (file.create, file.join) {
        (Some(create), None) => Action::Create {
            name: create.name,
            join_secret: create.join_secret.as_deref().map(secret).transpose()?,
        },
        (None, Some(join)) => {
            let secret = secret(&join.secret)?;
            let ca = join.ca_fingerprint.map(|text| text.parse::<Fingerprint>()).transpose();
            Action::Join(Invitation {
                token: secret.agreed_id(),
                secret,
                ca: ca.map_err(|_| FirstBootError::Fingerprint)?,
                addresses: vec![join.address],
            })
        }
        _ => return Err(FirstBootError::Which),
    };
    Ok(FirstBoot { node_name: file.node_name, action })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_sides_agree_on_the_token() {
        let founder = parse("[create]\nname='prod'\njoin_secret='correct horse battery'").unwrap();
        let other = parse("[join]\naddress='10.0.0.1:7443'\nsecret='correct horse battery'").unwrap();
        let Action::Create { join_secret: Some(secret), .. } = founder.action else { panic!("not created") };
        let Action::Join(invitation) = other.action else { panic!("not joined") };
        assert_eq!(invitation.token, secret.agreed_id());
        assert!(invitation.secret.matches(&secret.hash()));
    }

    #[test]
    fn mistakes_are_named() {
        for (text, word) in [
            ("", "either"),
            ("[create]\nname='a'\n[join]\naddress='1.2.3.4:5'\nsecret='0123456789abcdef'", "either"),
            ("[create]\nname='a'\njoin_secret='short'", "shorter"),
            ("[create]\nname='a'\ncolour='red'", "colour"),
            ("[join]\naddress='nowhere'\nsecret='0123456789abcdef'", "address"),
            ("[join]\naddress='1.2.3.4:5'\nsecret='0123456789abcdef'\nca_fingerprint='x'", "sha256"),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}
