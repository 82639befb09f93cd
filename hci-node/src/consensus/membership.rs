//! Who votes.
//!
//! Three or five nodes vote, however many there are: more voters make commits slower and nothing safer. An even number
//! tolerates no more losses than the odd one below, except that of two nodes both must vote, or the second would be
//! no help at all.

use std::collections::BTreeSet;

/// How many of this many members vote.
fn voters_among(members: usize) -> usize {
    match members {
        0..=3 => members,
        4 => 3,
        _ => 5,
    }
}

/// Chooses the voters among the members: those who vote already stay as far as there is room, then come the others in
/// order of their ids.
pub(super) fn choose_voters<Id: Copy + Ord>(members: &BTreeSet<Id>, present: &BTreeSet<Id>) -> BTreeSet<Id> {
    let staying = members.intersection(present);
    let joining = members.difference(present);
    staying.chain(joining).take(voters_among(members.len())).copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_or_five_vote_and_voters_stay() {
        for (members, expected) in [(1, 1), (2, 2), (3, 3), (4, 3), (5, 5), (6, 5), (32, 5)] {
            let members: BTreeSet<u32> = (0..members).collect();
            assert_eq!(choose_voters(&members, &BTreeSet::new()).len(), expected);
        }
        // Node 9 votes and stays; of the lost voter 1 nothing remains; 2 and 3 fill up.
        let voters = choose_voters(&BTreeSet::from([2, 3, 4, 9]), &BTreeSet::from([1, 9]));
        assert_eq!(voters, BTreeSet::from([2, 3, 9]));
    }
}
