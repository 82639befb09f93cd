//! Token strings, and the proofs made from their secrets. Pure.
//!
//! A token string is `hci1.` and base64url of its parts: what it is good for, its id, its secret, the fingerprint of
//! the cluster's CA and the addresses of the API. The cluster stores only SHA-256 of the secret, which is also the key
//! of the proof by which a server shows that it knows the token before it is told the secret.

use std::net::SocketAddr;

use aws_lc_rs::{constant_time, digest, hmac, rand};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use netfabric::pki::Fingerprint;
use serde::{Deserialize, Serialize};

use crate::state::{SecretHash, TokenId};

/// Start of every token string; the number is the version of the format.
const PREFIX: &str = "hci1.";
/// Longest token string that is looked at.
const MAX_LENGTH: usize = 4096;

/// The secret of a token.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret([u8; 32]);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// Random numbers are not to be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the system gives no random numbers")]
pub struct NoRandom;

/// Random bytes.
pub fn random<const N: usize>() -> Result<[u8; N], NoRandom> {
    let mut bytes = [0; N];
    rand::fill(&mut bytes).map_err(|_| NoRandom)?;
    Ok(bytes)
}

impl Secret {
    /// A new one.
    pub fn generate() -> Result<Self, NoRandom> {
        Ok(Self(random()?))
    }

    /// A secret that people agreed on in advance: any text.
    pub fn from_phrase(phrase: &str) -> Self {
        Self(sha256(&[b"hci join secret", phrase.as_bytes()]))
    }

    /// The id that a token with an agreed secret has, so that both sides know it.
    pub fn agreed_id(&self) -> TokenId {
        let digest = sha256(&[b"hci token id", &self.0]);
        let mut id = [0; 16];
        id.copy_from_slice(&digest[..16]);
        TokenId(uuid::Uuid::from_bytes(id))
    }

    /// What the cluster stores.
    pub fn hash(&self) -> SecretHash {
        SecretHash(sha256(&[b"hci token", &self.0]))
    }

    /// Whether this is the secret that the hash is of; takes the same time either way.
    pub fn matches(&self, hash: &SecretHash) -> bool {
        constant_time::verify_slices_are_equal(&self.hash().0, &hash.0).is_ok()
    }
}

fn sha256(parts: &[&[u8]]) -> [u8; 32] {
    let mut context = digest::Context::new(&digest::SHA256);
    for part in parts {
        context.update(part);
    }
    let mut bytes = [0; 32];
    bytes.copy_from_slice(context.finish().as_ref());
    bytes
}

/// Shows that whoever makes it knows the token, and binds that to one CA.
pub fn prove(hash: &SecretHash, nonce: &[u8; 32], ca: &Fingerprint) -> [u8; 32] {
    let key = hmac::Key::new(hmac::HMAC_SHA256, &hash.0);
    let mut context = hmac::Context::with_key(&key);
    context.update(b"hci join proof");
    context.update(nonce);
    context.update(ca.to_string().as_bytes());
    let mut proof = [0; 32];
    proof.copy_from_slice(context.sign().as_ref());
    proof
}

/// Checks such a proof.
pub fn is_proven(hash: &SecretHash, nonce: &[u8; 32], ca: &Fingerprint, proof: &[u8; 32]) -> bool {
    constant_time::verify_slices_are_equal(&prove(hash, nonce, ca), proof).is_ok()
}

/// What a token is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Purpose {
    /// Joining.
    Join,
    /// The API.
    Admin,
}

/// The parts of a token string.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenString {
    /// What it is good for.
    pub purpose: Purpose,
    /// Its id.
    pub id: TokenId,
    /// Its secret.
    pub secret: Secret,
    /// The CA of the cluster.
    pub ca: Fingerprint,
    /// Where the API is.
    pub addresses: Vec<SocketAddr>,
}

/// What is wrong with a token string.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenStringError {
    /// It is something else.
    #[error("this is no token: it does not start with {PREFIX}")]
    Foreign,
    /// It is cut off or mistyped.
    #[error("the token is damaged: copy all of it")]
    Damaged,
}

impl TokenString {
    /// As text.
    pub fn encode(&self) -> String {
        // Serializing plain values into memory does not fail; an empty token is refused like any damaged one.
        let body = postcard::to_stdvec(self).unwrap_or_default();
        format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(with_checksum(body)))
    }

    /// From text.
    pub fn decode(text: &str) -> Result<Self, TokenStringError> {
        let body = text.trim().strip_prefix(PREFIX).ok_or(TokenStringError::Foreign)?;
        if body.len() > MAX_LENGTH {
            return Err(TokenStringError::Damaged);
        }
        let bytes = URL_SAFE_NO_PAD.decode(body).map_err(|_| TokenStringError::Damaged)?;
        let (body, sum) = bytes.split_last_chunk::<4>().ok_or(TokenStringError::Damaged)?;
        if sha256(&[body])[..4] != *sum {
            return Err(TokenStringError::Damaged);
        }
        postcard::from_bytes(body).map_err(|_| TokenStringError::Damaged)
    }
}

/// Tells a mistyped token from a wrong one.
fn with_checksum(mut body: Vec<u8>) -> Vec<u8> {
    let sum = sha256(&[&body]);
    body.extend_from_slice(&sum[..4]);
    body
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn fingerprint(byte: u8) -> Fingerprint {
        Fingerprint::of(&[byte])
    }

    fn token() -> TokenString {
        TokenString {
            purpose: Purpose::Join,
            id: TokenId::random(),
            secret: Secret::generate().unwrap(),
            ca: fingerprint(1),
            addresses: vec!["10.0.0.1:7443".parse().unwrap(), "[fd00::1]:7443".parse().unwrap()],
        }
    }

    #[test]
    fn a_token_survives_its_text() {
        let token = token();
        assert_eq!(TokenString::decode(&format!(" {}\n", token.encode())), Ok(token));
    }

    #[test]
    fn a_cut_off_or_mistyped_token_is_told_from_a_foreign_one() {
        let text = token().encode();
        assert_eq!(TokenString::decode(&text[..text.len() - 1]), Err(TokenStringError::Damaged));
        let swapped = text.replacen(|c: char| c.is_ascii_lowercase(), "_", 40).replacen("____", "hci1", 1);
        assert!(TokenString::decode(&swapped).is_err());
        assert_eq!(TokenString::decode("hello"), Err(TokenStringError::Foreign));
    }

    #[test]
    fn a_proof_holds_for_its_secret_nonce_and_ca_only() {
        let (secret, other) = (Secret::from_phrase("a"), Secret::from_phrase("b"));
        let proof = prove(&secret.hash(), &[1; 32], &fingerprint(1));
        assert!(is_proven(&secret.hash(), &[1; 32], &fingerprint(1), &proof));
        assert!(!is_proven(&other.hash(), &[1; 32], &fingerprint(1), &proof));
        assert!(!is_proven(&secret.hash(), &[2; 32], &fingerprint(1), &proof));
        assert!(!is_proven(&secret.hash(), &[1; 32], &fingerprint(2), &proof));
        assert!(secret.matches(&secret.hash()) && !other.matches(&secret.hash()));
    }

    proptest! {
        #[test]
        fn garbage_is_an_error(text in "\\PC{0,200}") {
            prop_assert!(TokenString::decode(&text).is_err());
            let prefixed = format!("hci1.{text}");
            prop_assert!(TokenString::decode(&prefixed).is_err());
        }
    }
}
